// Biases of the projections: added in fp32 to what the product left, and their gradients.
#pragma once

#include "layer/moe.h"
#include "layer/routing.h"

namespace ktlib {

// c[r][0..width) += bias[first + r]: results by features.
inline void add_bias_to_rows(float* c, int64_t ldc, const Matrix& bias, int64_t first, int rows, int width) {
  for (int r = 0; r < rows; r++) {
    const float value = bias[first + r];
    for (int i = 0; i < width; i++) c[r * ldc + i] += value;
  }
}

// c[r][i] += bias[first + i]: results by tokens.
inline void add_bias_to_columns(float* c, int64_t ldc, const Matrix& bias, int64_t first, int rows, int columns) {
  constexpr int kBlock = 64;
  for (int j = 0; j < columns; j += kBlock) {
    const int count = columns - j < kBlock ? columns - j : kBlock;
    float values[kBlock];
    for (int i = 0; i < count; i++) values[i] = bias[first + j + i];
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < count; i++) c[r * ldc + j + i] += values[i];
  }
}

// sum_i bias[first + i] * row[i]: a token's gradient against the bias of its expert. One partial sum per lane.
float dot_bias(const Matrix& bias, int64_t first, const bf16* row, int count);

// grads.gate_up_bias, grads.down_bias: sums over an expert's rows of d_gate_up, and of the routing weight times dy.
void bias_grads(const Call& call, const Plan& plan, const Shape& shape, const bf16* dy, int64_t dy_ld,
                const float* weight, const bf16* d_gate_up, int64_t d_gate_up_ld, const Grads& grads);

}  // namespace ktlib
