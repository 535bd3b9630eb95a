// Gradients of the expert weights themselves, for full fine-tuning: sums over an expert's tokens of outer products.
//
//     d(down_proj)[e]    = (weight * grad_output)^T . h        [hidden][inter]
//     d(gate_up_proj)[e] = d_gate_up^T . x                     [2 * inter][hidden]
//
// and where the weights are stored transposed, these transposed: the factors change places.
//
// Each is one product with the tokens as its depth: the left factor is transposed once, the right one packed once.
#include "layer/weight_grads.h"

#include <cstring>

#include "system/pages.h"
#include "system/scratch.h"
#include "system/threads.h"

namespace ktlib {
namespace {

constexpr int kRows = 128;      // rows of one task
constexpr int kColumnsOut = 256;  // columns of one task
constexpr int kTokenBlock = 128;

struct Factor {
  const bf16* data;      // [slots] rows of `size` in sorted order, or by `index`
  int64_t ld;
  int size;
  const int32_t* index;  // row of `data` for each sorted row, or null

  const bf16* row(int64_t sorted) const { return data + (index ? index[sorted] : sorted) * ld; }
};

// dst[e][left.size][right.size] = sum over the rows of e of scale[row] * left[row] (x) right[row], bf16.
void outer_products(const Call& call, const Plan& plan, int64_t experts, const Factor& left, const float* scale,
                    const Factor& right, bf16* dst) {
  const Kernels& k = call.kernels;
  const int64_t tokens = plan.depth[experts];  // each expert's padded with zeros
  const int64_t ld = row_stride<bf16>(tokens), columns = round_up(right.size, kColumns);
  populate(call.threads, dst, experts * left.size * right.size * int64_t(sizeof(bf16)));
  const Buffer<bf16> turned((left.size + k.row_unit) * ld, call.threads);  // [left.size][tokens]
  const Buffer<bf16> panels(tokens * columns, call.threads);               // by expert
  const ThreadBuffer<float> c_scratch(call.threads, std::max(kTokenBlock, kRows + k.row_unit) * kMaxWidth);

  const std::vector<Task> turns = block_tasks(plan, kTokenBlock, left.size, kMaxWidth);
  for_tasks(call, turns, [&](const Task& task, int thread) {
    float* c = c_scratch[thread];  // [rows][kMaxWidth]
    const bool last = task.row + task.rows == plan.begin[task.expert + 1];
    const int64_t offset = task.row - plan.begin[task.expert];
    const int padded = last ? int(plan.depth[task.expert + 1] - plan.depth[task.expert] - offset) : task.rows;
    for (int i = 0; i < task.rows; i++)
      k.widen(c + i * kMaxWidth, left.row(task.row + i) + task.first, scale ? scale[task.row + i] : 1.0f, task.count);
    std::memset(c + task.rows * kMaxWidth, 0, size_t(padded - task.rows) * kMaxWidth * sizeof(float));
    k.store_rows_bf16(turned + task.first * ld + plan.depth[task.expert] + offset, ld, c, kMaxWidth, padded, task.count);
  });

  auto panel = [&](int expert, int j) {
    return panels + plan.depth[expert] * columns + j * (plan.depth[expert + 1] - plan.depth[expert]);
  };
  const std::vector<Task> packs = feature_tasks(plan, right.size, kMaxWidth);
  for_tasks(call, packs, [&](const Task& task, int) {
    const bf16* src = right.data + task.first + (right.index ? 0 : task.row * right.ld);
    const int width = int(round_up(task.count, kColumns)), count = plan.count(task.expert);
    bf16* dst = panel(task.expert, task.first);
    const int64_t filled = round_up(count, k.depth_unit), depth = plan.depth[task.expert + 1] - plan.depth[task.expert];
    k.pack_pairs(dst, depth, width, src, right.ld, right.index ? right.index + task.row : nullptr, count, task.count);
    for (int i = 0; i < width; i += kColumns)
      std::memset(dst + i * depth + filled * kColumns, 0, size_t((depth - filled) * kColumns) * sizeof(bf16));
  });

  const int64_t row_blocks = (left.size + kRows - 1) / kRows, column_blocks = (right.size + kColumnsOut - 1) / kColumnsOut;
  parallel_tasks(call, experts * row_blocks * column_blocks, [&](int64_t index, int thread) {
    const int expert = int(index / (row_blocks * column_blocks));
    const int first = int(index / column_blocks % row_blocks) * kRows, rows = std::min(kRows, left.size - first);
    const int begin = int(index % column_blocks) * kColumnsOut, end = std::min(begin + kColumnsOut, right.size);
    float* c = c_scratch[thread];
    bf16* out = dst + (int64_t(expert) * left.size + first) * right.size;
    const int depth = int(plan.depth[expert + 1] - plan.depth[expert]);
    for (int j = begin; j < end && !interrupted(call); j += kMaxWidth) {
      const int count = std::min(kMaxWidth, end - j), width = int(round_up(count, kColumns));
      if (depth > 0) {
        k.multiply(c, width, turned + first * ld + plan.depth[expert], ld, panel(expert, j), depth, width, rows, depth,
                   false);
        k.unpermute(c, width, rows, width);
      }
      for (int r = 0; r < rows; r++) {
        bf16* row = out + int64_t(r) * right.size + j;
        if (depth > 0)
          k.round(row, c + int64_t(r) * width, 1.0f, count);
        else
          std::memset(row, 0, size_t(count) * sizeof(bf16));
      }
    }
  });
}

}  // namespace

void weight_grads(const Call& call, const Plan& plan, const Inputs& in, const bf16* saved_gate_up, const bf16* dy,
                  int64_t dy_ld, const float* weight, const bf16* d_gate_up, int64_t d_gate_up_ld, const Grads& grads) {
  const Kernels& k = call.kernels;
  const Settings& settings = in.settings;
  const int hidden = int(in.shape.hidden), inter = int(in.shape.inter), gate_up_width = int(GateUp::width(in.shape));
  auto outer = [&](const Factor& out, const Factor& input, const float* scale, bf16* dst) {
    outer_products(call, plan, in.shape.experts, settings.transposed ? input : out, scale,
                   settings.transposed ? out : input, dst);
  };
  if (grads.gate_up_proj)
    outer({d_gate_up, d_gate_up_ld, gate_up_width, nullptr}, {in.hidden_states, hidden, hidden, plan.token_of_row.data()},
          nullptr, grads.gate_up_proj);
  if (grads.down_proj) {
    const Buffer<bf16> h(in.shape.slots() * inter, call.threads);  // [row][inter], from gate and up as saved
    const GateUp all(settings.interleaved, inter, 0, inter);
    const ThreadBuffer<float> scratch(call.threads, 3 * int64_t(inter));
    for_tasks(call, row_tasks(plan, kTokenBlock), [&](const Task& task, int thread) {
      float *gate_up = scratch[thread], *act = gate_up + gate_up_width;
      for (int64_t row = task.row; row < task.row + task.rows; row++) {
        k.widen(gate_up, saved_gate_up + row * gate_up_width, 1.0f, gate_up_width);
        k.activate(settings.gate, act, gate_up + all.gate, gate_up + all.up, all.step, inter);
        k.round(h + row * inter, act, 1.0f, inter);
      }
    });
    outer({dy, dy_ld, hidden, nullptr}, {h.get(), inter, inter, nullptr}, weight, grads.down_proj);
  }
}

}  // namespace ktlib
