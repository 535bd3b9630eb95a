// LoRA matrices of the active experts in the form that the kernels read, and gradients back in PEFT's layout.
#pragma once

#include <vector>

#include "moe.h"
#include "parallel.h"
#include "plan.h"

namespace ktlib {

// A few percent of the weights' size at most, made anew in each call: nothing of an adapter outlives the call.
//
// The inner value of a LoRA product (lora_A x, or lora_B^T d(output)) has only `rank` elements, so it is kept as the sum
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

  LoraForm(const Kernels& k, int threads, const Plan& plan, const Lora& lora, int64_t in, int64_t out);
  explicit operator bool() const { return rank > 0; }
  const bf16* a(int expert) const { return A + int64_t(expert) * rows * in_depth; }
  const bf16* b(int expert) const { return B + int64_t(expert) * out * depth; }
};

// values[rows][columns] (ld) -> low[rows][columns]: what rounding `values` to bf16 loses.
void low_part(float* low, const float* values, int64_t ld, int rows, int columns);

// Gradients of one LoRA pair as partial sums, one part per block of rows: dA [parts][rank][in] and dB transposed
// [parts][rank][out], fp32. Each part is written by one task per block of columns.
struct LoraGrads {
  Matrix A, B;  // destinations in PEFT's layout; null = not wanted
  int rank = 0;
  int64_t in = 0, out = 0;
  Buffer<float> dA, dBt;

  LoraGrads(const Lora& lora, const Matrix& A, const Matrix& B, int64_t in, int64_t out, int64_t parts);
  float* a(int part) const { return dA + int64_t(part) * rank * in; }
  float* bt(int part) const { return dBt + int64_t(part) * rank * out; }
  // Sums each expert's parts in order and stores them; experts without tokens get zeros.
  void store(const Kernels& k, int threads, const std::vector<Task>& parts, int64_t experts) const;
};

}  // namespace ktlib
