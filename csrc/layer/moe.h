// The layer of routed experts as two pure functions of the tensors of one call.
//
//     output[t] = sum_j top_k_weights[t, j] * down(act(gate(x[t])) * up(x[t]))     with expert top_k_index[t, j]
//
// Names: tokens, hidden, inter(mediate), experts, topk; a *slot* is one (token, j); a *row* is a slot's place after
// sorting by expert (layer/routing.h). All matrices are row-major and contiguous.
//
// The 2 * inter outputs of gate_up (rows of the weight, its bias, lora_B, saved values and gradients alike) are gates
// first, then ups, or alternate ("interleaved"); their order is the same throughout (GateUp).
//
// Where a value is rounded to bf16 (everything else, sums included, is fp32), the same in every instruction set:
//   1. on entry (by the caller): hidden_states, grad_output; LoRA matrices given as fp32
//   2. h = act(gate) * up, the input of the down projection
//   3. gate and up, where saved for backward (not across the gate's limit: layer/gate_limit.h)
//   4. backward: d(gate), d(up), the input of the product with the gate and up weights
//   5. on exit, where the result is bf16: output, gradients
// The inner values of LoRA products have 16 bits of mantissa (layer/lora.h).
#pragma once

#include <cstdint>

#include "system/call.h"
#include "weights/weight.h"

namespace ktlib {

struct Shape {
  int64_t tokens = 0, hidden = 0, inter = 0, experts = 0, topk = 0;
  int64_t slots() const { return tokens * topk; }
};

// A matrix of bf16 or fp32, as torch gives it; null where absent.
struct Matrix {
  void* data = nullptr;
  bool fp32 = false;
  explicit operator bool() const { return data != nullptr; }
  int64_t element_size() const { return fp32 ? sizeof(float) : sizeof(bf16); }
  float operator[](int64_t i) const {
    return fp32 ? static_cast<const float*>(data)[i] : to_float(static_cast<const bf16*>(data)[i]);
  }
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

// How the layer is computed, whatever its tensors.
struct Settings {
  Gate gate;
  Dropout dropout;           // of the input of both LoRA pairs, by slot of the whole batch
  bool transposed = false;   // how the weights are stored, see Inputs
  bool interleaved = false;  // the outputs of gate_up alternate
  int numa_parts = 1;        // of the weights' rows, one for each NUMA node: a preference of threads for tasks (layer/routing.h)
  bool whole = false;        // the batch is one chunk, as backward needs it for gradients of expert weights and biases
};

struct Inputs {
  Shape shape;
  Settings settings;
  const bf16* hidden_states = nullptr;   // [tokens][hidden]
  const int64_t* top_k_index = nullptr;  // [tokens][topk]
  const float* top_k_weights = nullptr;  // [tokens][topk]
  Weight gate_up_proj;                   // [experts][2 * inter][hidden]; transposed: [experts][hidden][2 * inter]
  Weight down_proj;                      // [experts][hidden][inter]; transposed: [experts][inter][hidden]
  Matrix gate_up_bias;                   // [experts][2 * inter], or null
  Matrix down_bias;                      // [experts][hidden], or null
  Lora gate_up_lora;                     // in = hidden, out = 2 * inter
  Lora down_lora;                        // in = inter, out = hidden
  const bool* elsewhere = nullptr;       // [experts], or null: computed on another device; their slots are no rows here
  int64_t first_slot = 0;                // of this chunk of the batch

  Inputs chunk(int64_t first_token, int64_t tokens) const {
    Inputs chunk = *this;
    chunk.shape.tokens = tokens;
    chunk.hidden_states += first_token * shape.hidden;
    chunk.top_k_index += first_token * shape.topk;
    chunk.top_k_weights += first_token * shape.topk;
    chunk.first_slot += first_token * shape.topk;
    return chunk;
  }
};

// Where gates and ups of the features [first, first + count) lie among the outputs of gate_up.
struct GateUp {
  // How many outputs there are in all, written here alone: experts without a gate would have `inter`.
  static int64_t width(const Shape& shape) { return 2 * shape.inter; }

  struct Range {
    int first, count;
  };
  Range ranges[2];  // all of them: gates and ups apart, or one range where they alternate
  int size;         // ranges in use
  int gate, up;     // the first feature's gate and up
  int step;         // from one gate to the next

  GateUp(bool interleaved, int inter, int first, int count)
      : ranges{{interleaved ? 2 * first : first, interleaved ? 2 * count : count}, {inter + first, count}},
        size(interleaved ? 1 : 2),
        gate(ranges[0].first),
        up(interleaved ? gate + 1 : inter + first),
        step(interleaved ? 2 : 1) {}
  const Range* begin() const { return ranges; }
  const Range* end() const { return ranges + size; }
};

// What forward leaves for backward, in sorted rows of each chunk of the batch (layer/routing.h, for_chunks).
struct Saved {
  bf16* gate_up = nullptr;     // [slots][2 * inter]: gate and up, bias included, before clamp and activation
  bf16* t_gate_up = nullptr;   // [2 * rank][slots]: scaling * lora_A x, high and low half (layer/lora.h)
  bf16* t_down = nullptr;      // [2 * rank][slots]: scaling * lora_A h, likewise

  Saved from_slot(const Shape& shape, int64_t slot) const {
    return {gate_up ? gate_up + slot * GateUp::width(shape) : nullptr, t_gate_up ? t_gate_up + slot : nullptr,
            t_down ? t_down + slot : nullptr};
  }
};

// Gradients to compute; null members are not wanted. With those of expert weights or biases the batch is one chunk.
struct Grads {
  Matrix hidden_states;
  float* top_k_weights = nullptr;
  Matrix gate_up_A, gate_up_B, down_A, down_B;
  bf16* gate_up_proj = nullptr;
  bf16* down_proj = nullptr;
  Matrix gate_up_bias, down_bias;
};

// Throws std::invalid_argument, with nothing written, if an expert id is out of range. Without an output, forward computes
// only what it saves. Settings must be the same in both.
void forward(const Call& call, const Inputs& in, const Matrix& output, const Saved& saved);
void backward(const Call& call, const Inputs& in, const Saved& saved, const bf16* grad_output, const Grads& grads);

}  // namespace ktlib
