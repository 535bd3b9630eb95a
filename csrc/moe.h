// The layer of routed experts as two pure functions of the tensors of one call.
//
//     output[t] = sum_j top_k_weights[t, j] * down(silu(gate(x[t])) * up(x[t]))     with expert top_k_index[t, j]
//
// Names: tokens, hidden, inter(mediate), experts, topk; a *slot* is one (token, j); a *row* is a slot's place after
// sorting by expert (plan.h). All matrices are row-major and contiguous.
//
// Where a value is rounded to bf16 (everything else, sums included, is fp32), the same in every instruction set:
//   1. on entry (by the caller): hidden_states, grad_output; LoRA matrices given as fp32
//   2. h = act(gate) * up, the input of the down projection
//   3. gate and up, where saved for backward
//   4. backward: d(gate), d(up), the input of the product with the gate and up weights
//   5. on exit, where the result is bf16: output, gradients
// The inner values of LoRA products are kept to 16 bits of mantissa (lora.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace ktlib {

struct Shape {
  int64_t tokens, hidden, inter, experts, topk;
  int64_t slots() const { return tokens * topk; }
};

// A matrix of bf16 or fp32, as torch gives it; null where absent.
struct Matrix {
  void* data = nullptr;
  bool fp32 = false;
  explicit operator bool() const { return data != nullptr; }
  int64_t element_size() const { return fp32 ? sizeof(float) : sizeof(bf16); }
  Matrix from(int64_t offset) const {
    if (!data) return *this;
    return {static_cast<char*>(data) + offset * element_size(), fp32};
  }
};

// PEFT's layout: A (experts * rank, in), expert-major; B (out, rank * experts), the expert fastest.
struct Lora {
  Matrix A, B;
  int rank = 0;
  float scaling = 1.0f;
  explicit operator bool() const { return rank > 0; }
};

struct Inputs {
  const bf16* hidden_states;   // [tokens][hidden]
  const int64_t* top_k_index;  // [tokens][topk]
  const float* top_k_weights;  // [tokens][topk]
  const bf16* gate_up_proj;    // [experts][2 * inter][hidden], gate rows first
  const bf16* down_proj;       // [experts][hidden][inter]
  Lora gate_up_lora;           // in = hidden, out = 2 * inter
  Lora down_lora;              // in = inter, out = hidden
  Gate gate;

  Inputs from_token(const Shape& shape, int64_t token) const {
    Inputs part = *this;
    part.hidden_states += token * shape.hidden;
    part.top_k_index += token * shape.topk;
    part.top_k_weights += token * shape.topk;
    return part;
  }
};

// What forward leaves for backward, in sorted rows of each part of the batch (plan.h, for_parts).
struct Saved {
  bf16* gate_up = nullptr;     // [slots][2 * inter]: gate and up before the activation
  bf16* t_gate_up = nullptr;   // [2 * rank][slots]: scaling * lora_A x, high and low part (lora.h)
  bf16* t_down = nullptr;      // [2 * rank][slots]: scaling * lora_A h, likewise

  Saved from_slot(const Shape& shape, int64_t slot) const {
    return {gate_up ? gate_up + slot * 2 * shape.inter : nullptr, t_gate_up ? t_gate_up + slot : nullptr,
            t_down ? t_down + slot : nullptr};
  }
};

// Gradients to compute; null members are not wanted. With those of the expert weights the batch is one part.
struct Grads {
  Matrix hidden_states;
  float* top_k_weights = nullptr;
  Matrix gate_up_A, gate_up_B, down_A, down_B;
  bf16* gate_up_proj = nullptr;
  bf16* down_proj = nullptr;
};

// Throws std::invalid_argument, with nothing written, if an expert id is out of range. whole: the batch is one part, as
// backward needs it for gradients of the expert weights; the same in both.
void forward(const Kernels& k, int threads, const Shape& shape, const Inputs& in, const Matrix& output,
             const Saved& saved, bool whole);
void backward(const Kernels& k, int threads, const Shape& shape, const Inputs& in, const Saved& saved,
              const bf16* grad_output, const Grads& grads, bool whole);

}  // namespace ktlib
