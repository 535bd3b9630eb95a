// The sum over a token's slots that ends both passes.
#pragma once

#include <vector>

#include "layer/moe.h"
#include "layer/routing.h"
#include "system/scratch.h"
#include "system/threads.h"

namespace ktlib {

// The columns that one round of the last product leaves in scratch: all, unless that would be large.
inline int output_range(int64_t rows, int hidden) {
  constexpr int64_t kBytes = int64_t(64) << 20;
  constexpr int kRange = 512;
  return rows * hidden * int64_t(sizeof(float)) <= kBytes ? hidden : std::min(hidden, kRange);
}

// out[t][first + i] = sum_j weights[t, j] * y[row of slot (t, j)][i] for i < count, in the order of j, over the slots that
// have a row; y has ld `ld`, weights null means ones.
inline void combine_tokens(const Call& call, const Plan& plan, const Shape& shape, const Buffer<float>& y,
                           int64_t ld, const float* weights, const Matrix& out, int first, int count) {
  constexpr int kTokens = 16;
  parallel_tasks(call, (shape.tokens + kTokens - 1) / kTokens, [&](int64_t index, int) {
    std::vector<const float*> rows;
    std::vector<float> factors;
    for (int64_t t = index * kTokens; t < std::min(shape.tokens, (index + 1) * kTokens); t++) {
      rows.clear();
      factors.clear();
      for (int64_t slot = t * shape.topk; slot < (t + 1) * shape.topk; slot++) {
        if (plan.row_of_slot[slot] < 0) continue;
        rows.push_back(y + plan.row_of_slot[slot] * ld);
        if (weights) factors.push_back(weights[slot]);
      }
      const int64_t offset = t * shape.hidden + first;
      call.kernels.combine(out.fp32 ? nullptr : static_cast<bf16*>(out.data) + offset,
                           out.fp32 ? static_cast<float*>(out.data) + offset : nullptr, rows.data(),
                           weights ? factors.data() : nullptr, int(rows.size()), count);
    }
  });
}

}  // namespace ktlib
