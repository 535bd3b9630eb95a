#include "layer/routing.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace ktlib {

std::vector<int32_t> used_experts(const Inputs& in) {
  const Shape& shape = in.shape;
  std::vector<char> used(shape.experts, 0);
  for (int64_t slot = 0; slot < shape.slots(); slot++) {
    const int64_t expert = in.top_k_index[slot];
    if (expert < 0 || expert >= shape.experts)
      throw std::invalid_argument("top_k_index: got expert id " + std::to_string(expert) + " for token " +
                                  std::to_string(slot / shape.topk) + ", slot " + std::to_string(slot % shape.topk) +
                                  "; ids must be in [0, " + std::to_string(shape.experts) + ")");
    used[expert] = !in.elsewhere || !in.elsewhere[expert];
  }
  std::vector<int32_t> experts;
  for (int64_t e = 0; e < shape.experts; e++)
    if (used[e]) experts.push_back(int32_t(e));
  return experts;
}

Plan::Plan(const Inputs& in) {
  const Shape& shape = in.shape;
  const int64_t slots = shape.slots();
  const auto here = [&](int64_t slot) { return !in.elsewhere || !in.elsewhere[in.top_k_index[slot]]; };
  begin.assign(shape.experts + 1, 0);
  for (int64_t slot = 0; slot < slots; slot++) begin[in.top_k_index[slot] + 1] += here(slot);
  column.assign(shape.experts + 1, 0);
  depth.assign(shape.experts + 1, 0);
  for (int64_t e = 0; e < shape.experts; e++) {
    const int64_t count = begin[e + 1];
    column[e + 1] = column[e] + round_up(count, kColumns);
    depth[e + 1] = depth[e] + round_up(count, kDepth);
    begin[e + 1] += begin[e];
    if (count > 0) active.push_back(int32_t(e));
  }
  token_of_row.resize(rows());
  slot_of_row.resize(rows());
  row_of_slot.assign(slots, -1);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t slot = 0; slot < slots; slot++) {
    if (!here(slot)) continue;
    const int64_t row = next[in.top_k_index[slot]]++;
    row_of_slot[slot] = int32_t(row);
    slot_of_row[row] = int32_t(slot);
    token_of_row[row] = int32_t(slot / shape.topk);
  }
  std::stable_sort(active.begin(), active.end(), [&](int a, int b) { return count(a) > count(b); });
}

std::vector<Task> block_tasks(const Plan& plan, int rows, int total, int size) {
  std::vector<Task> tasks;
  int row_block = 0;
  for (int expert : plan.active)
    for (int64_t row = plan.begin[expert]; row < plan.begin[expert + 1]; row += rows, row_block++)
      for (int first = 0; first < total; first += size)
        tasks.push_back({expert, first, std::min(size, total - first), row,
                         int(std::min<int64_t>(rows, plan.begin[expert + 1] - row)), row_block});
  return tasks;
}

std::vector<Task> feature_tasks(const Plan& plan, int total, int size) {
  return block_tasks(plan, std::numeric_limits<int>::max(), total, size);
}

std::vector<Task> row_tasks(const Plan& plan, int size) { return block_tasks(plan, size, 1, 1); }

}  // namespace ktlib
