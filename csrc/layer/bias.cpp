#include "layer/bias.h"

#include <cstring>

#include "system/threads.h"

namespace ktlib {
namespace {

constexpr int kBlock = 256;  // columns of one task

// dst[e][size] = sum over the rows of e of scale[row] * src[row], in the order of the rows; scale null = ones.
void sums_of_rows(const Call& call, const Plan& plan, int64_t experts, const bf16* src, int64_t ld,
                  int size, const float* scale, const Matrix& dst) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  parallel_tasks(call, experts * blocks, [&](int64_t task, int) {
    const int64_t expert = task / blocks, first = task % blocks * kBlock;
    const int count = int(std::min<int64_t>(kBlock, size - first));
    float sum[kBlock] = {}, row_values[kBlock];
    for (int64_t row = plan.begin[expert]; row < plan.begin[expert + 1]; row++) {
      call.kernels.widen(row_values, src + row * ld + first, scale ? scale[row] : 1.0f, count);
      for (int i = 0; i < count; i++) sum[i] += row_values[i];
    }
    const Matrix out = dst.from(expert * size + first);
    if (out.fp32)
      std::memcpy(out.data, sum, size_t(count) * sizeof(float));
    else
      call.kernels.round(static_cast<bf16*>(out.data), sum, 1.0f, count);
  });
}

}  // namespace

float dot_bias(const Matrix& bias, int64_t first, const bf16* row, int count) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  for (int i = 0; i < count; i += kLanes)
    for (int lane = 0; lane < std::min(kLanes, count - i); lane++)
      sums[lane] += bias[first + i + lane] * to_float(row[i + lane]);
  float sum = 0.0f;
  for (float lane : sums) sum += lane;
  return sum;
}

void bias_grads(const Call& call, const Plan& plan, const Shape& shape, const bf16* dy, int64_t dy_ld,
                const float* weight, const bf16* d_gate_up, int64_t d_gate_up_ld, const Grads& grads) {
  if (grads.gate_up_bias)
    sums_of_rows(call, plan, shape.experts, d_gate_up, d_gate_up_ld, int(GateUp::width(shape)), nullptr,
                 grads.gate_up_bias);
  if (grads.down_bias)
    sums_of_rows(call, plan, shape.experts, dy, dy_ld, int(shape.hidden), weight, grads.down_bias);
}

}  // namespace ktlib
