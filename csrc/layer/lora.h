// LoRA matrices of the active experts in the form that the kernels read, and gradients back in PEFT's layout.
#pragma once

#include <vector>

#include "layer/moe.h"
#include "layer/routing.h"
#include "system/scratch.h"

namespace ktlib {

// A few percent of the weights' size at most, made anew in each call: nothing of an adapter outlives the call.
//
// The inner value of a LoRA product (lora_A x, or lora_B^T d(output)) has only `rank` elements, so it is held as the sum
// of two bf16, `high` and `low`: 2 * rank more elements of depth for the accumulation that it joins, and no rounding
// worth mentioning. Both meet the same factor, which is therefore stored twice.
struct LoraForm {
  int rank = 0;     // 0: no adapter
  int rows = 0;     // 2 * rank rounded up to row_unit
  int depth = 0;    // 2 * rank rounded up to depth_unit
  float scaling = 1.0f;
  int64_t in = 0, out = 0;
  int64_t in_depth = 0;  // `in` rounded up to depth_unit
  Buffer<bf16> A;        // [experts][rows][in_depth]: lora_A twice, zero-padded
  Buffer<bf16> B;        // [experts][out][depth]: lora_B twice, zero-padded

  // Only the matrices of the experts in `used` are filled.
  LoraForm(const Call& call, int64_t experts, const std::vector<int32_t>& used, const Lora& lora,
           int64_t in, int64_t out);
  explicit operator bool() const { return rank > 0; }
  const bf16* a(int expert) const { return A + int64_t(expert) * rows * in_depth; }
  const bf16* b(int expert) const { return B + int64_t(expert) * out * depth; }
};

// values[rows][columns] (ld) -> low[rows][columns]: what rounding `values` to bf16 loses.
void low_half(float* low, const float* values, int64_t ld, int rows, int columns);

// Gradients of one LoRA pair: partial sums, one for each block of rows of one chunk of the batch, added up in order.
struct LoraGrads {
  Matrix A, B;  // destinations in PEFT's layout; null = not wanted
  int rank = 0;
  int64_t in = 0, out = 0, experts = 0;
  Buffer<float> dA, dBt;    // [blocks of rows][rank][in], [blocks of rows][rank][out]: B's gradient is transposed
  Buffer<float> sumA, sumBt;  // [experts][rank][in], [experts][rank][out]
  std::vector<char> touched;  // experts whose sums hold something

  LoraGrads(const Lora& lora, const Matrix& A, const Matrix& B, int64_t in, int64_t out, int64_t experts);
  // Before a chunk of the batch: room for its blocks of rows.
  void reserve(int64_t blocks);
  float* a(int block) const { return dA + int64_t(block) * rank * in; }
  float* bt(int block) const { return dBt + int64_t(block) * rank * out; }
  // After it: adds the blocks (row_tasks' list) to the sums.
  void add(const Call& call, const std::vector<Task>& blocks);
  // Stores the sums; experts without tokens get zeros.
  void store(const Call& call) const;
};

}  // namespace ktlib
