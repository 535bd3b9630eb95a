// Forward pass. Weights are the row operand, as they lie in memory; the tokens of an expert are packed once into
// panels and meet every weight row there. A result tile is [feature][token], so two features of h interleave straight
// into the panel of the down projection: there is no transpose between the two products.
#include <cstring>

#include "layer/bias.h"
#include "layer/combine.h"
#include "layer/dropout.h"
#include "layer/forward_packed.h"
#include "layer/gate_limit.h"
#include "layer/lora.h"
#include "layer/moe.h"
#include "layer/routing.h"
#include "system/pages.h"
#include "system/threads.h"
#include "weights/weight.h"

namespace ktlib {
namespace {

constexpr int kFeatures = 32;  // gate rows (and as many up rows) of one task
constexpr int kOutputs = 128;  // down rows of one task

// Weights that are codes are decoded in blocks that stay in L2 while the token panels of a run meet them. Rows of the usual
// length are decoded whole: then the codes are read as they lie in memory. (With AMX and 8 or 48 tokens, blocks of 32 x 512,
// which stay in L1, were 7 to 10 % slower for INT8 and INT4 and 8 % faster for e4m3; 16 x 2048 made no difference.)
constexpr int kDecodedRows = 32;
constexpr int kDecodedDepth = 2048;
constexpr int kRun = 8;

// The token panels of one block of rows of one expert, narrower at the end: body(first row, tokens, width, column).
template <class Body>
void for_panels(const Call& call, const Plan& plan, const Task& task, const Body& body) {
  const int64_t offset = task.row - plan.begin[task.expert];
  const int panel_width = call.kernels.panel_width;
  for (int i = 0; i < task.rows && !interrupted(call); i += panel_width) {
    const int tokens = std::min(panel_width, task.rows - i);
    body(task.row + i, tokens, int(round_up(tokens, kColumns)), plan.column[task.expert] + offset + i);
  }
}

// The rows of a task in runs that decode its weights once: body(run). Weights in place need no more than a panel at a time.
template <class Body>
void for_runs(const Call& call, const Weight& weight, const Task& task, const Body& body) {
  const int rows = call.kernels.panel_width * (weight.is_coded() ? kRun : 1);
  for (int i = 0; i < task.rows && !interrupted(call); i += rows) {
    Task run = task;
    run.row += i;
    run.rows = std::min(rows, task.rows - i);
    body(run);
  }
}

// Rows [first, first + count) of a weight. In place they are found once for all panels of a task; codes are left to
// `products`.
Rows rows_in_place(const Kernels& k, const Weight& weight, int expert, int64_t first, int count, bf16* scratch) {
  if (weight.is_coded()) return {};
  return padded_rows(k, weight, expert, first, count, 0, weight.columns, scratch);
}

// Scratch, in elements, for rows of a weight as the two functions here need it.
int64_t rows_size(const Kernels& k, const Weight& weight, int count) {
  return weight.is_coded() ? padded_size(k, kDecodedRows, kDecodedDepth) : padded_size(k, count, weight.columns);
}

// c[panel][c_row + i][width] = row first + i of a weight . the panels of a run, `depth` deep; panels c_size apart.
void products(const Call& call, const Plan& plan, const Task& run, const Weight& weight, const Rows& in_place,
              int64_t first, int count, const bf16* panels, int64_t depth, float* c, int64_t c_size, int c_row, bf16* scratch) {
  const Kernels& k = call.kernels;
  const bool coded = weight.is_coded();
  const int rows = coded ? kDecodedRows : count;
  const int64_t step = coded ? kDecodedDepth : depth;
  for (int r = 0; r < count; r += rows)
    for (int64_t d = 0; d < depth; d += step) {
      const int row_count = std::min(rows, count - r);
      const int64_t columns = std::min(step, weight.columns - d);
      const bool last = d + step >= depth;  // of these rows: the next block begins the next ones
      const int64_t ahead = last ? rows * weight.row_bytes() - row_bytes(weight.format, d) : row_bytes(weight.format, step);
      const Rows w =
          coded ? padded_rows(k, weight, run.expert, first + r, row_count, d, columns, scratch, ahead) : in_place;
      float* panel_c = c;
      for_panels(call, plan, run, [&](int64_t, int, int width, int64_t column) {
        k.multiply(panel_c + (c_row + r) * width, width, w.data, w.ld, panels + column * depth + d * kColumns, depth, width,
                   row_count, int(std::min(step, depth - d)), d > 0);
        panel_c += c_size;
      });
    }
}

// t = scaling * lora_A . panel, as the panel that continues the product with the weights: [depth][width], high then low.
// The panel's tokens are the rows from `row` on. kept: scratch (layer/dropout.h).
void lora_project(const Kernels& k, const LoraForm& lora, const InputMask& mask, int expert, const bf16* panel, int width,
                  int64_t row, int tokens, bf16* t_panel, float* c, bf16* kept, bf16* saved, int64_t saved_ld) {
  const int64_t size = int64_t(lora.rank) * width;
  if (mask)
    multiply_kept(k, mask, c, lora, expert, panel, width, row, tokens, kept);
  else
    k.multiply(c, width, lora.a(expert), lora.in_depth, panel, lora.in_depth, width, lora.rank, int(lora.in_depth), false);
  for (int64_t i = 0; i < size; i++) c[i] *= lora.scaling;
  low_half(c + size, c, width, lora.rank, width);
  std::memset(c + 2 * size, 0, size_t(lora.depth - 2 * lora.rank) * width * sizeof(float));
  k.interleave(t_panel, lora.depth, width, c, width, lora.depth);
  if (saved)
    for (int r = 0; r < 2 * lora.rank; r++) k.round(saved + r * saved_ld, c + int64_t(r) * width, 1.0f, tokens);
}

// One chunk of the batch. saved_ld: slots of the whole batch.
void forward_chunk(const Call& call, const Inputs& in, const LoraForm& gate_up_lora, const LoraForm& down_lora,
                  const Matrix& output, const Saved& saved, int64_t saved_ld) {
  const Kernels& k = call.kernels;
  const Shape& shape = in.shape;
  const Settings& settings = in.settings;
  const Plan plan(in);
  const int hidden = int(shape.hidden), inter = int(shape.inter), gate_up_width = int(GateUp::width(shape));
  const int64_t rows = plan.rows(), columns = plan.column[shape.experts];
  const int64_t hidden_depth = round_up(hidden, k.depth_unit), inter_depth = round_up(inter, k.depth_unit);
  if (saved.gate_up) populate(call.threads, saved.gate_up, rows * gate_up_width * int64_t(sizeof(bf16)));

  const Buffer<bf16> x_panels(columns * hidden_depth, call.threads);  // [column][hidden_depth] by panels
  const Buffer<bf16> h_panels(columns * inter_depth, call.threads);   // [column][inter_depth] by panels
  const Buffer<bf16> gate_up_t(columns * gate_up_lora.depth);          // [column][depth] by panels
  const Buffer<bf16> down_t(columns * down_lora.depth);
  const int range = output_range(rows, hidden);
  const Buffer<float> y(output ? rows * range : 0, call.threads);     // [row][range]: each expert's output
  const int64_t gate_up_size = (kFeatures * 2 + k.row_unit) * k.panel_width, down_size = (kOutputs + k.row_unit) * k.panel_width;
  const int64_t gate_up_run = in.gate_up_proj.is_coded() ? kRun : 1, down_run = in.down_proj.is_coded() ? kRun : 1;
  const int64_t rank_rows = std::max(gate_up_lora.rows + gate_up_lora.depth, down_lora.rows + down_lora.depth);
  const ThreadBuffer<float> c_scratch(call.threads, std::max({gate_up_run * gate_up_size + kFeatures * k.panel_width,
                                                              down_run * down_size, rank_rows * k.panel_width}));
  const InputMask x_mask(k, in, gate_up_lora, plan, InputMask::gate_up), h_mask(k, in, down_lora, plan, InputMask::down);
  const ThreadBuffer<bf16> kept_scratch(call.threads, x_mask || h_mask ? kKeptScratch : 0);
  const int64_t w_size = rows_size(k, in.gate_up_proj, kFeatures);
  const ThreadBuffer<bf16> w_scratch(call.threads, std::max(2 * w_size, rows_size(k, in.down_proj, kOutputs)));

  // 1. tokens -> panels; t of gate_up
  const std::vector<Task> panels = row_tasks(plan, k.panel_width);
  for_tasks(call, panels, [&](const Task& task, int thread) {
    for_panels(call, plan, task, [&](int64_t row, int tokens, int width, int64_t column) {
      bf16* panel = x_panels + column * hidden_depth;
      k.pack_rows(panel, width, in.hidden_states, hidden, plan.token_of_row.data() + row, tokens, hidden);
      if (gate_up_lora)
        lora_project(k, gate_up_lora, x_mask, task.expert, panel, width, row, tokens,
                     gate_up_t + column * gate_up_lora.depth, c_scratch[thread], kept_scratch[thread],
                     saved.t_gate_up ? saved.t_gate_up + row : nullptr, saved_ld);
    });
  });

  // 2. gate, up, h = act(gate) * up
  const std::vector<Task> features = feature_tasks(plan, inter, kFeatures);
  const auto numa_part_of = [&](const Task& task) { return int(int64_t(task.first) * settings.numa_parts / inter); };
  for_tasks(call, features, settings.numa_parts, numa_part_of, [&](const Task& task, int thread) {
    const GateUp block(settings.interleaved, inter, task.first, task.count);
    const int64_t first_row = int64_t(task.expert) * gate_up_width;
    Rows w[2];
    for (int p = 0; p < block.size; p++)
      w[p] = rows_in_place(k, in.gate_up_proj, task.expert, block.ranges[p].first, block.ranges[p].count,
                           w_scratch[thread] + p * w_size);
    const bool last = task.first + task.count == inter;
    float* c = c_scratch[thread];  // by panel: gate [count][width], and from row kFeatures on up; or both alternating
    float* const h = c + gate_up_run * gate_up_size;
    for_runs(call, in.gate_up_proj, task, [&](const Task& run) {
      for (int p = 0; p < block.size; p++)
        products(call, plan, run, in.gate_up_proj, w[p], block.ranges[p].first, block.ranges[p].count, x_panels.get(),
                 hidden_depth, c, gate_up_size, p * kFeatures, w_scratch[thread]);
      float* gate = c;
      for_panels(call, plan, run, [&](int64_t row, int tokens, int width, int64_t column) {
        float* up = gate + kFeatures * width;
        float* const sides[2] = {gate, up};
        for (int p = 0; p < block.size; p++) {
          const GateUp::Range range = block.ranges[p];
          if (gate_up_lora)
            k.multiply(sides[p], width, gate_up_lora.b(task.expert) + int64_t(range.first) * gate_up_lora.depth,
                       gate_up_lora.depth, gate_up_t + column * gate_up_lora.depth, gate_up_lora.depth, width,
                       range.count, gate_up_lora.depth, true);
          if (in.gate_up_bias)
            add_bias_to_rows(sides[p], width, in.gate_up_bias, first_row + range.first, range.count, width);
        }
        const int contiguous = settings.interleaved ? width : task.count * width;  // gates, and as many ups
        for (int64_t i = 0; i < int64_t(task.count) * width; i += contiguous) {
          float* gates = settings.interleaved ? gate + 2 * i : gate;
          float* ups = settings.interleaved ? gates + width : up;
          k.activate(settings.gate, h + i, gates, ups, 1, contiguous);
          if (saved.gate_up && settings.gate.has_limit()) round_within_limit(settings.gate, gates, ups, 1, contiguous);
        }
        for (int p = 0; saved.gate_up && p < block.size; p++)
          k.store_rows_bf16(saved.gate_up + row * gate_up_width + block.ranges[p].first, gate_up_width, sides[p], width,
                            block.ranges[p].count, tokens);
        k.interleave(h_panels + column * inter_depth + task.first * kColumns, inter_depth, width, h, width, task.count);
        for (int i = 0; last && i < width; i += kColumns) {  // the rest of the depth
          const int64_t filled = round_up(inter, 2);
          std::memset(h_panels + (column + i) * inter_depth + filled * kColumns, 0,
                      size_t((inter_depth - filled) * kColumns) * sizeof(bf16));
        }
        gate += gate_up_size;
      });
    });
  });

  // 3. t of down
  if (down_lora)
    for_tasks(call, panels, [&](const Task& task, int thread) {
      for_panels(call, plan, task, [&](int64_t row, int tokens, int width, int64_t column) {
        lora_project(k, down_lora, h_mask, task.expert, h_panels + column * inter_depth, width, row, tokens,
                     down_t + column * down_lora.depth, c_scratch[thread], kept_scratch[thread],
                     saved.t_down ? saved.t_down + row : nullptr, saved_ld);
      });
    });

  for (int first = 0; output && first < hidden; first += range) {
    const int count = std::min(range, hidden - first);

    // 4. y = down . h
    const std::vector<Task> outputs = feature_tasks(plan, count, kOutputs);
    const auto numa_part_of = [&](const Task& task) {
      return int(int64_t(first + task.first) * settings.numa_parts / hidden);
    };
    for_tasks(call, outputs, settings.numa_parts, numa_part_of, [&](const Task& task, int thread) {
      const int64_t feature = first + task.first;
      const Rows w = rows_in_place(k, in.down_proj, task.expert, feature, task.count, w_scratch[thread]);
      for_runs(call, in.down_proj, task, [&](const Task& run) {
        float* c = c_scratch[thread];  // by panel: [count][width]
        products(call, plan, run, in.down_proj, w, feature, task.count, h_panels.get(), inter_depth, c, down_size, 0,
                 w_scratch[thread]);
        for_panels(call, plan, run, [&](int64_t row, int tokens, int width, int64_t column) {
          if (down_lora)
            k.multiply(c, width, down_lora.b(task.expert) + feature * down_lora.depth, down_lora.depth,
                       down_t + column * down_lora.depth, down_lora.depth, width, task.count, down_lora.depth, true);
          if (in.down_bias)
            add_bias_to_rows(c, width, in.down_bias, task.expert * shape.hidden + feature, task.count, width);
          k.store_rows_f32(y + row * range + task.first, range, c, width, task.count, tokens);
          c += down_size;
        });
      });
    });

    // 5. output[t] = sum over slots, in slot order
    combine_tokens(call, plan, shape, y, range, in.top_k_weights, output, first, count);
  }
}

}  // namespace

void forward(const Call& given, const Inputs& in, const Matrix& output, const Saved& saved) {
  const std::vector<int32_t> used = used_experts(in);
  const Shape& shape = in.shape;
  const Call call = with_useful_threads(given, shape);
  const LoraForm gate_up_lora(call, shape.experts, used, in.gate_up_lora, shape.hidden, GateUp::width(shape));
  const LoraForm down_lora(call, shape.experts, used, in.down_lora, shape.inter, shape.hidden);
  if (output) populate(call.threads, output.data, shape.tokens * shape.hidden * output.element_size());
  const auto compute = in.settings.transposed ? forward_chunk_transposed : forward_chunk;
  for_chunks(in, [&](const Inputs& chunk, int64_t first) {
    compute(call, chunk, gate_up_lora, down_lora, output.from(first * shape.hidden),
            saved.from_slot(shape, first * shape.topk), shape.slots());
  });
}

}  // namespace ktlib
