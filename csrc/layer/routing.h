// Routing: slots sorted by expert (a counting sort, in token order within an expert), and how the rows are cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layer/moe.h"
#include "system/threads.h"

namespace ktlib {

struct Plan {
  std::vector<int64_t> begin;          // [experts + 1]: rows of expert e are begin[e] .. begin[e + 1]
  std::vector<int64_t> column;         // [experts + 1]: the same with each expert's count rounded up to kColumns
  std::vector<int64_t> depth;          // [experts + 1]: the same, rounded up to kDepth, for products over tokens
  std::vector<int32_t> token_of_row;   // [rows]
  std::vector<int32_t> slot_of_row;    // [rows]
  std::vector<int32_t> row_of_slot;    // [slots]; -1: its expert is computed elsewhere
  std::vector<int32_t> active;         // experts that received tokens, most tokens first

  static constexpr int kDepth = 32;

  // Ids must have been checked (used_experts).
  explicit Plan(const Inputs& in);
  int64_t rows() const { return begin.back(); }
  int count(int expert) const { return int(begin[expert + 1] - begin[expert]); }
};

// Experts that received tokens to be computed here, ascending. Throws std::invalid_argument naming token and slot if an id
// is out of range.
std::vector<int32_t> used_experts(const Inputs& in);

// Long batches go through the layer in chunks of this many slots (unless `whole`), so that scratch does not grow with
// them. Saved rows are sorted within each chunk.
constexpr int64_t kChunkSlots = 24576;

// Calls body(inputs of the chunk, its first token) for each chunk.
template <class Body>
void for_chunks(const Inputs& in, const Body& body) {
  const int64_t tokens = in.shape.tokens;
  if (in.settings.whole) return body(in, 0);  // also without tokens: gradients of the weights are zero then
  const int64_t size = std::max<int64_t>(1, kChunkSlots / in.shape.topk);
  for (int64_t first = 0; first < tokens; first += size) body(in.chunk(first, std::min(size, tokens - first)), first);
}

// The call with as many threads as are worth waking for this much work: a parallel region costs some microseconds, far
// more where cores are shared.
inline Call with_useful_threads(const Call& call, const Shape& shape) {
  constexpr double kWorthAThread = 8e6;  // multiply-adds, of which there may be more than an int64_t counts
  const double worth = 1 + 3.0 * double(shape.slots()) * double(shape.hidden) * double(shape.inter) / kWorthAThread;
  return {call.kernels, int(std::min<double>(threads_here(call.threads), worth)), call.interruption};
}

// One task: a block of something (features, rows, ...) of one expert.
struct Task {
  int expert;
  int first, count;    // the block
  int64_t row;         // first row of the block of rows (plan.begin[expert] where the task has all rows)
  int rows;
  int row_block;       // number of that block of rows over all experts: where its partial sums go
};

// body(task, thread) for every task, as parallel_tasks.
template <class Body>
void for_tasks(const Call& call, const std::vector<Task>& tasks, const Body& body) {
  parallel_tasks(call, int64_t(tasks.size()), [&](int64_t index, int thread) { body(tasks[index], thread); });
}

// The same where a task reads mostly rows that lie on NUMA node number numa_part_of(task) (system/pages.h,
// place_pages): threads take the tasks of their own node first and then help out with the others'.
template <class PartOf, class Body>
void for_tasks(const Call& call, const std::vector<Task>& tasks, int numa_parts, const PartOf& numa_part_of, const Body& body) {
  if (numa_parts == 1) return for_tasks(call, tasks, body);
  std::vector<std::vector<Task>> tasks_of(numa_parts);
  for (const Task& task : tasks) tasks_of[numa_part_of(task)].push_back(task);
  std::vector<std::atomic<int64_t>> next(numa_parts);
  parallel_tasks(call, std::min<int64_t>(call.threads, int64_t(tasks.size())), [&](int64_t, int thread) {
    for (int i = 0; i < numa_parts; i++) {
      const int part = (numa_node() + i) % numa_parts;
      const int64_t size = int64_t(tasks_of[part].size());
      for (int64_t n; (n = next[part].fetch_add(1, std::memory_order_relaxed)) < size;)
        if (!interrupted(call)) body(tasks_of[part][n], thread);
    }
  });
}

// All rows of each active expert x blocks of `size` of `total` features.
std::vector<Task> feature_tasks(const Plan& plan, int total, int size);
// Blocks of `size` rows of each active expert.
std::vector<Task> row_tasks(const Plan& plan, int size);
// Both, for products too large for one task; experts' row blocks are numbered in row_tasks' order.
std::vector<Task> block_tasks(const Plan& plan, int rows, int total, int size);

}  // namespace ktlib
