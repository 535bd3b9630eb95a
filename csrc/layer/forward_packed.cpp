// Forward pass of transposed weights. Their rows run along the outputs, as the rows of plain weights run along the
// columns that backward computes: so here too tokens are the row operand and weights are interleaved on the fly.
#include "layer/forward_packed.h"

#include <cstring>

#include "layer/bias.h"
#include "layer/combine.h"
#include "layer/dropout.h"
#include "layer/gate_limit.h"
#include "layer/routing.h"
#include "layer/row_products.h"
#include "system/pages.h"
#include "system/threads.h"

namespace ktlib {
namespace {

constexpr int kFeatures = kColumnsOut / 2;  // features of one task: as many gates and as many ups
constexpr int kRowsSmall = 128;             // rows of one task of the products with lora_A

// Rows of bf16 with a tail of zeros, as `multiply` reads them.
struct PaddedRows {
  int64_t size, stride;
  Buffer<bf16> memory;

  PaddedRows(const Call& call, int64_t rows, int64_t size)
      : size(size), stride(row_stride<bf16>(size)), memory((rows + call.kernels.row_unit) * stride, call.threads) {}
  bf16* operator[](int64_t row) const { return memory + row * stride; }
  void clear_tail(int64_t row) const {
    std::memset((*this)[row] + size, 0, size_t(stride - size) * sizeof(bf16));
  }
};

}  // namespace

void forward_chunk_transposed(const Call& call, const Inputs& in, const LoraForm& gate_up_lora,
                             const LoraForm& down_lora, const Matrix& output, const Saved& saved, int64_t saved_ld) {
  const Kernels& k = call.kernels;
  const Shape& shape = in.shape;
  const Settings& settings = in.settings;
  const Plan plan(in);
  const int hidden = int(shape.hidden), inter = int(shape.inter), gate_up_width = int(GateUp::width(shape));
  const int64_t count = plan.rows();
  if (saved.gate_up) populate(call.threads, saved.gate_up, count * gate_up_width * int64_t(sizeof(bf16)));
  const PaddedRows x(call, count, hidden), h(call, count, inter);
  const Buffer<bf16> gate_up_t((count + k.row_unit) * gate_up_lora.depth);  // [row][depth]
  const Buffer<bf16> down_t((count + k.row_unit) * down_lora.depth);
  const int range = output_range(count, hidden);
  const Buffer<float> y(output ? count * range : 0, call.threads);  // [row][range]: each expert's output
  const ThreadBuffer<float> c_scratch(call.threads, (kRows + k.row_unit) * kLdc);
  const ThreadBuffer<float> h_scratch(call.threads, kFeatures);
  const ThreadBuffer<bf16> panel_scratch(call.threads, kPanels);
  const InputMask x_mask(k, in, gate_up_lora, plan, InputMask::gate_up), h_mask(k, in, down_lora, plan, InputMask::down);
  const int64_t kept_rows = x_mask || h_mask ? kRowsSmall + k.row_unit : 0;
  const ThreadBuffer<bf16> kept_scratch(call.threads, kept_rows * std::max(x.stride, h.stride));

  // t of one pair from the rows that it adapts; the saved form by rank.
  auto project = [&](const LoraForm& lora, const InputMask& mask, const Task& task, const PaddedRows& rows,
                     const Buffer<bf16>& t, bf16* saved_t, int thread) {
    bf16* input = rows[task.row];
    if (mask) {
      bf16* kept = kept_scratch[thread];
      mask.fill(kept, rows.stride, task.row, task.rows, 0, int(rows.size));
      keep(kept, kept, input, task.rows * rows.stride);  // zero in the tails, as they are
      input = kept;
    }
    const Term product = {input, rows.stride, lora.a(task.expert), lora.in_depth, int(rows.size), true};
    lora_inner(call, lora, product, task.rows, nullptr, t + task.row * lora.depth,
               saved_t ? saved_t + task.row : nullptr, saved_ld, panel_scratch[thread], c_scratch[thread]);
  };
  // The term of one pair that joins the product with the weights: columns [first, ...) of its outputs.
  auto lora_term = [&](const LoraForm& lora, const Task& task, const Buffer<bf16>& t, int64_t first) -> Term {
    if (!lora) return {};
    return {t + task.row * lora.depth, lora.depth, lora.b(task.expert) + first * lora.depth, lora.depth, lora.depth,
            true};
  };

  // 1. sort hidden_states; t of gate_up
  const std::vector<Task> row_blocks = row_tasks(plan, kRowsSmall);
  for_tasks(call, row_blocks, [&](const Task& task, int thread) {
    for (int64_t row = task.row; row < task.row + task.rows; row++) {
      std::memcpy(x[row], in.hidden_states + plan.token_of_row[row] * shape.hidden, size_t(hidden) * sizeof(bf16));
      x.clear_tail(row);
      h.clear_tail(row);
    }
    if (gate_up_lora) project(gate_up_lora, x_mask, task, x, gate_up_t, saved.t_gate_up, thread);
  });

  // 2. gate, up, h = act(gate) * up
  const std::vector<Task> features = block_tasks(plan, kRows, inter, kFeatures);
  for_tasks(call, features, [&](const Task& task, int thread) {
    const GateUp block(settings.interleaved, inter, task.first, task.count);
    float* c = c_scratch[thread];  // [rows][kLdc]: gates, then ups from kFeatures on; or alternating
    for (int p = 0; p < block.size; p++) {
      const auto [first, count] = block.ranges[p];
      float* side = c + p * kFeatures;
      sum_of_products(call, side, task.rows, count,
                      {term(x[task.row], x.stride, in.gate_up_proj, task.expert, first, false),
                       lora_term(gate_up_lora, task, gate_up_t, first)},
                      panel_scratch[thread]);
      if (in.gate_up_bias)
        add_bias_to_columns(side, kLdc, in.gate_up_bias, int64_t(task.expert) * gate_up_width + first, task.rows, count);
    }
    float* h_row = h_scratch[thread];
    for (int i = 0; i < task.rows; i++) {
      float *gates = c + i * kLdc, *ups = gates + (settings.interleaved ? 1 : kFeatures);
      k.activate(settings.gate, h_row, gates, ups, block.step, task.count);
      k.round(h[task.row + i] + task.first, h_row, 1.0f, task.count);
      if (!saved.gate_up) continue;
      if (settings.gate.has_limit()) round_within_limit(settings.gate, gates, ups, block.step, task.count);
      for (int p = 0; p < block.size; p++)
        k.round(saved.gate_up + (task.row + i) * gate_up_width + block.ranges[p].first, gates + p * kFeatures, 1.0f,
                block.ranges[p].count);
    }
  });

  // 3. t of down
  if (down_lora)
    for_tasks(call, row_blocks, [&](const Task& task, int thread) {
      project(down_lora, h_mask, task, h, down_t, saved.t_down, thread);
    });

  for (int first = 0; output && first < hidden; first += range) {
    const int count = std::min(range, hidden - first);

    // 4. y = down . h
    const std::vector<Task> outputs = block_tasks(plan, kRows, count, kColumnsOut);
    for_tasks(call, outputs, [&](const Task& task, int thread) {
      const int64_t feature = first + task.first;
      float* c = c_scratch[thread];
      sum_of_products(call, c, task.rows, task.count,
                      {term(h[task.row], h.stride, in.down_proj, task.expert, feature, false),
                       lora_term(down_lora, task, down_t, feature)},
                      panel_scratch[thread]);
      if (in.down_bias)
        add_bias_to_columns(c, kLdc, in.down_bias, task.expert * shape.hidden + feature, task.rows, task.count);
      for (int i = 0; i < task.rows; i++)
        std::memcpy(y + (task.row + i) * range + task.first, c + i * kLdc, size_t(task.count) * sizeof(float));
    });

    // 5. output[t] = sum over slots, in slot order
    combine_tokens(call, plan, shape, y, range, in.top_k_weights, output, first, count);
  }
}

}  // namespace ktlib
