// Backward pass: layer/forward_in_place.cpp in reverse. Tokens are the row operand now; blocks of weight rows are interleaved
// on the fly into a panel small enough for L1 and meet every token of the expert there, so weights are read once.
//
//     dh = grad_output . W_down                        (the routing weight is applied to dh in fp32)
//     d(weight) = <dh, h> + <grad_output, down_bias>   (so the expert's output need not be saved)
//     dgate, dup = act'(gate, up, weight * dh)
//     dx = [dgate dup] . W_gate_up
//
// A LoRA pair adds its term to the same accumulators, as `rank` more rows of the contraction, and its gradients are
// products over the tokens of an expert, taken block by block where the other factor is at hand. With dropout on the
// pair's input that term is a product of its own, of which the mask keeps some elements.
#include <cstring>

#include "layer/bias.h"
#include "layer/combine.h"
#include "layer/dropout.h"
#include "layer/lora.h"
#include "layer/moe.h"
#include "layer/routing.h"
#include "layer/row_products.h"
#include "layer/weight_grads.h"
#include "system/pages.h"
#include "system/threads.h"

namespace ktlib {
namespace {

constexpr int kRowsSmall = 128;  // rows of one task of the products with lora_B
constexpr int kRowsAhead = 2;    // rows fetched ahead of the one that is worked on

// Harmless where there is no such memory.
template <bool write>
void prefetch(const bf16* row, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(bf16))) __builtin_prefetch(row + i, write);
}

// The inner value of one LoRA pair and its partner in the gradient, both by rank, and the inner value once more by rows
// for the product with lora_A. High half, then low half.
struct Inner {
  int64_t ld;
  Buffer<bf16> rows;   // [rows][depth]: s * lora_B^T d(output)
  Buffer<bf16> for_A;  // [2 * rank][ld]: the same, times the routing weight where d(output) has none
  Buffer<bf16> for_B;  // [2 * rank][ld]: s * t, times the routing weight likewise

  Inner(const Kernels& k, const LoraForm& lora, int64_t count)
      : ld(count), rows((count + k.row_unit) * lora.depth), for_A(2 * lora.rank * ld), for_B(2 * lora.rank * ld) {}
};

// inner.for_B of one block of rows, from the saved t [2 * rank][ldt]. weights: of these rows, or null for ones.
void inner_for_B(const LoraForm& lora, const Task& task, const bf16* t, int64_t ldt, const float* weights,
                 const Inner& inner) {
  for (int r = 0; r < lora.rank; r++) {
    const bf16* high = t + r * ldt + task.row;
    const bf16* low = high + lora.rank * ldt;
    bf16* dst = inner.for_B + r * inner.ld + task.row;
    for (int i = 0; i < task.rows; i++) {
      const float value = (weights ? weights[i] : 1.0f) * (to_float(high[i]) + to_float(low[i]));
      dst[i] = to_bf16(value);
      dst[lora.rank * inner.ld + i] = to_bf16(value - to_float(dst[i]));
    }
  }
}

// inner.rows and inner.for_A of one block of rows, from d_out [rows][out] (the block's first row at d_out).
void inner_for_A(const Call& call, const LoraForm& lora, const Task& task, const bf16* d_out, int64_t ld,
                 const float* weights, const Inner& inner, bf16* panel, float* c) {
  lora_inner(call, lora, {d_out, ld, lora.b(task.expert), lora.depth, int(lora.out), false}, task.rows, weights,
             inner.rows + task.row * lora.depth, inner.for_A + task.row, inner.ld, panel, c);
}

// The term of one LoRA pair in the gradient of its input, columns [first, ...).
Term lora_term(const LoraForm& lora, const Task& task, const Inner& inner, int64_t first) {
  if (!lora) return {};
  return {inner.rows + task.row * lora.depth, lora.depth, lora.a(task.expert) + first, lora.in_depth, 2 * lora.rank,
          false};
}

// One chunk of the batch. Members without a value here are what the chunk is made of; the others pass from phase to phase.
struct BackwardChunk {
  const Call& call;
  const Inputs& in;
  const LoraForm &gate_up_lora, &down_lora;
  const Saved saved;
  const int64_t saved_ld;  // slots of the whole batch
  const bf16* const grad_output;
  const Grads grads;
  LoraGrads &gate_up_grads, &down_grads;

  const Kernels& k = call.kernels;
  const Settings& settings = in.settings;
  const int hidden = int(in.shape.hidden), inter = int(in.shape.inter), gate_up_width = int(GateUp::width(in.shape));
  const Plan plan{in};
  const int64_t rows = plan.rows();
  const int64_t hidden_stride = row_stride<bf16>(hidden), gate_up_stride = row_stride<bf16>(gate_up_width);
  const Inner gate_up_inner{k, gate_up_lora, rows}, down_inner{k, down_lora, rows};
  const std::vector<Task> blocks = row_tasks(plan, kRows), small_blocks = row_tasks(plan, kRowsSmall);
  const bool want_x = bool(grads.hidden_states);
  const bool bias_matters = in.down_bias && grads.top_k_weights;
  const int inter_blocks = (inter + kColumnsOut - 1) / kColumnsOut;
  const int partials = inter_blocks + (bias_matters ? 1 : 0);

  const Buffer<bf16> dy{(rows + k.row_unit) * hidden_stride, call.threads};  // [row][hidden]: grad_output, sorted
  const Buffer<bf16> d_gate_up{(rows + k.row_unit) * gate_up_stride, call.threads};  // [row][2 * inter]
  const int range = output_range(rows, hidden);
  const Buffer<float> dx{want_x ? rows * range : 0, call.threads};  // [row][range]
  const Buffer<float> d_weight{rows * partials};                    // [row][block]: partial <dh, h>; <dy, bias>
  const Buffer<float> weight{rows};                                 // [row]
  const ThreadBuffer<float> c_scratch{call.threads, (kRows + k.row_unit) * kLdc};
  const ThreadBuffer<bf16> panel_scratch{call.threads, kPanels};
  const InputMask x_mask{k, in, gate_up_lora, plan, InputMask::gate_up};
  const InputMask h_mask{k, in, down_lora, plan, InputMask::down};
  const bool masked = x_mask || h_mask;
  const ThreadBuffer<bf16> mask_scratch{call.threads, masked ? int64_t(kRows) * kColumnsOut : 0};
  const ThreadBuffer<float> term_scratch{call.threads, masked ? (kRows + k.row_unit) * kLdc : 0};

  void compute() {
    gate_up_grads.reserve(int64_t(blocks.size()));
    down_grads.reserve(int64_t(blocks.size()));
    sort_rows();
    compute_d_gate_up();
    if (gate_up_lora && (want_x || gate_up_grads.A)) compute_gate_up_inner();
    for (int first = 0; first < hidden && (want_x || gate_up_grads.A || down_grads.B); first += range) {
      const int count = std::min(range, hidden - first);
      compute_dx(first, count);
      if (want_x) combine_tokens(call, plan, in.shape, dx, range, nullptr, grads.hidden_states, first, count);
    }
    sum_d_weight();
    gate_up_grads.add(call, blocks);
    down_grads.add(call, blocks);
    bias_grads(call, plan, in.shape, dy.get(), hidden_stride, weight.get(), d_gate_up.get(), gate_up_stride, grads);
    weight_grads(call, plan, in, saved.gate_up, dy.get(), hidden_stride, weight.get(), d_gate_up.get(), gate_up_stride,
                 grads);
  }

  // grad_output and the routing weights by rows; inner values of down.
  void sort_rows() {
    for_tasks(call, small_blocks, [&](const Task& task, int thread) {
      for (int64_t row = task.row; row < task.row + task.rows; row++) {
        weight[row] = in.top_k_weights[plan.slot_of_row[row]];
        std::memcpy(dy + row * hidden_stride, grad_output + plan.token_of_row[row] * in.shape.hidden,
                    size_t(hidden) * sizeof(bf16));
        std::memset(dy + row * hidden_stride + hidden, 0, size_t(hidden_stride - hidden) * sizeof(bf16));
        std::memset(d_gate_up + row * gate_up_stride + gate_up_width, 0,
                    size_t(gate_up_stride - gate_up_width) * sizeof(bf16));
        if (bias_matters)
          d_weight[row * partials + inter_blocks] =
              dot_bias(in.down_bias, task.expert * in.shape.hidden, dy + row * hidden_stride, hidden);
      }
      if (gate_up_grads.B) inner_for_B(gate_up_lora, task, saved.t_gate_up, saved_ld, nullptr, gate_up_inner);
      if (down_grads.B) inner_for_B(down_lora, task, saved.t_down, saved_ld, weight + task.row, down_inner);
      if (down_lora)
        inner_for_A(call, down_lora, task, dy + task.row * hidden_stride, hidden_stride, weight + task.row, down_inner,
                    panel_scratch[thread], c_scratch[thread]);
    });
  }

  // dh, from it dgate, dup and d(weight); gradients of down's lora_A and gate_up's lora_B.
  void compute_d_gate_up() {
    const std::vector<Task> tasks = block_tasks(plan, kRows, inter, kColumnsOut);
    for_tasks(call, tasks, [&](const Task& task, int thread) {
      const GateUp block(settings.interleaved, inter, task.first, task.count);
      d_h(task, thread);
      gate_backward(task, block, thread);
      if (down_grads.A) d_down_A(task, thread);
      if (gate_up_grads.B) d_gate_up_B(task, block);
    });
  }

  // c_scratch[rows][kLdc] = dh.
  void d_h(const Task& task, int thread) {
    if (h_mask) h_mask.fill(mask_scratch[thread], kColumnsOut, task.row, task.rows, task.first, task.count);
    input_gradient(task,
                   term(dy + task.row * hidden_stride, hidden_stride, in.down_proj, task.expert, task.first,
                        settings.transposed),
                   lora_term(down_lora, task, down_inner, task.first), bool(h_mask), thread);
  }

  // d_gate_up and d_weight of a task; c_scratch has dh, and h afterwards.
  void gate_backward(const Task& task, const GateUp& block, int thread) {
    for (int i = 0; i < task.rows; i++) {
      const int64_t row = task.row + i;
      const bf16* gate_up = saved.gate_up + row * gate_up_width;
      bf16* d_row = d_gate_up + row * gate_up_stride;
      for (const GateUp::Range& run : block) {  // short runs of far rows, which no hardware prefetcher foresees
        prefetch<false>(gate_up + kRowsAhead * gate_up_width + run.first, run.count);
        prefetch<true>(d_row + kRowsAhead * gate_up_stride + run.first, run.count);
      }
      float& partial = d_weight[row * partials + task.first / kColumnsOut];
      partial = k.gate_backward(settings.gate, c_scratch[thread] + i * kLdc, gate_up + block.gate, gate_up + block.up,
                                block.step, weight[row], d_row + block.gate, d_row + block.up, task.count);
      if (h_mask) partial += zero_times(term_scratch[thread] + i * kLdc, task.count);
    }
  }

  void d_down_A(const Task& task, int thread) {
    float* h = c_scratch[thread];
    for (int i = 0; h_mask && i < task.rows; i++)
      keep(h + i * kLdc, mask_scratch[thread] + i * kColumnsOut, task.count);
    k.rank_grad_f32(down_grads.a(task.row_block) + task.first, inter, down_lora.rank, down_inner.for_A + task.row,
                    down_inner.ld, h, kLdc, nullptr, task.rows, task.count);
  }

  void d_gate_up_B(const Task& task, const GateUp& block) {
    for (const GateUp::Range& run : block)
      k.rank_grad_bf16(gate_up_grads.bt(task.row_block) + run.first, gate_up_width, gate_up_lora.rank,
                       gate_up_inner.for_B + task.row, gate_up_inner.ld,
                       d_gate_up + task.row * gate_up_stride + run.first, gate_up_stride, nullptr, task.rows, run.count);
  }

  void compute_gate_up_inner() {
    for_tasks(call, small_blocks, [&](const Task& task, int thread) {
      inner_for_A(call, gate_up_lora, task, d_gate_up + task.row * gate_up_stride, gate_up_stride, nullptr,
                  gate_up_inner, panel_scratch[thread], c_scratch[thread]);
    });
  }

  // Columns [first, first + count): dx by rows; gradients of gate_up's lora_A and down's lora_B.
  void compute_dx(int first, int count) {
    const std::vector<Task> tasks = block_tasks(plan, kRows, count, kColumnsOut);
    for_tasks(call, tasks, [&](const Task& task, int thread) {
      const int64_t feature = first + task.first;
      if (x_mask && (want_x || gate_up_grads.A))
        x_mask.fill(mask_scratch[thread], kColumnsOut, task.row, task.rows, int(feature), task.count);
      if (want_x) d_x(task, feature, thread);
      if (gate_up_grads.A) d_gate_up_A(task, feature, thread);
      if (down_grads.B) d_down_B(task, feature);
    });
  }

  void d_x(const Task& task, int64_t feature, int thread) {
    input_gradient(task,
                   term(d_gate_up + task.row * gate_up_stride, gate_up_stride, in.gate_up_proj, task.expert, feature,
                        settings.transposed),
                   lora_term(gate_up_lora, task, gate_up_inner, feature), bool(x_mask), thread);
    for (int i = 0; i < task.rows; i++)
      std::memcpy(dx + (task.row + i) * range + task.first, c_scratch[thread] + i * kLdc,
                  size_t(task.count) * sizeof(float));
  }

  // mask_scratch has the mask, and what it keeps of x afterwards.
  void d_gate_up_A(const Task& task, int64_t feature, int thread) {
    bf16* kept = mask_scratch[thread];
    const bf16* x = in.hidden_states + feature;
    const int32_t* tokens = plan.token_of_row.data() + task.row;
    for (int i = 0; x_mask && i < task.rows; i++)
      keep(kept + i * kColumnsOut, kept + i * kColumnsOut, x + tokens[i] * in.shape.hidden, task.count);
    k.rank_grad_bf16(gate_up_grads.a(task.row_block) + feature, hidden, gate_up_lora.rank, gate_up_inner.for_A + task.row,
                     gate_up_inner.ld, x_mask ? kept : x, x_mask ? kColumnsOut : hidden, x_mask ? nullptr : tokens,
                     task.rows, task.count);
  }

  void d_down_B(const Task& task, int64_t feature) {
    k.rank_grad_bf16(down_grads.bt(task.row_block) + feature, hidden, down_lora.rank, down_inner.for_B + task.row,
                     down_inner.ld, dy + task.row * hidden_stride + feature, hidden_stride, nullptr, task.rows,
                     task.count);
  }

  // The gradient of a projection's input, c_scratch[rows][kLdc]: what comes through the weights, and what comes through
  // LoRA, of which mask_scratch[rows][kColumnsOut] keeps some elements where masked; term_scratch then has all of it.
  void input_gradient(const Task& task, const Term& of_weights, const Term& of_lora, bool masked, int thread) {
    float* c = c_scratch[thread];
    sum_of_products(call, c, task.rows, task.count, {of_weights, masked ? Term{} : of_lora}, panel_scratch[thread]);
    if (!masked) return;
    float* term = term_scratch[thread];
    sum_of_products(call, term, task.rows, task.count, {of_lora}, panel_scratch[thread]);
    for (int i = 0; i < task.rows; i++)
      add_kept(c + i * kLdc, term + i * kLdc, mask_scratch[thread] + i * kColumnsOut, task.count);
  }

  // The gradient of the routing weights: sums over blocks, in order.
  void sum_d_weight() {
    const DefaultFloats floats;
    for (int64_t slot = 0; grads.top_k_weights && slot < in.shape.slots(); slot++) {
      const int64_t row = plan.row_of_slot[slot];
      float sum = 0.0f;
      for (int b = 0; row >= 0 && b < partials; b++) sum += d_weight[row * partials + b];
      grads.top_k_weights[slot] = sum;
    }
  }
};

}  // namespace

void backward(const Call& given, const Inputs& in, const Saved& saved, const bf16* grad_output, const Grads& grads) {
  const std::vector<int32_t> used = used_experts(in);
  const Shape& shape = in.shape;
  const Call call = with_useful_threads(given, shape);
  if (const Matrix& dx = grads.hidden_states)
    populate(call.threads, dx.data, shape.tokens * shape.hidden * dx.element_size());
  const LoraForm gate_up_lora(call, shape.experts, used, in.gate_up_lora, shape.hidden, GateUp::width(shape));
  const LoraForm down_lora(call, shape.experts, used, in.down_lora, shape.inter, shape.hidden);
  LoraGrads gate_up_grads(in.gate_up_lora, grads.gate_up_A, grads.gate_up_B, shape.hidden, GateUp::width(shape),
                          shape.experts);
  LoraGrads down_grads(in.down_lora, grads.down_A, grads.down_B, shape.inter, shape.hidden, shape.experts);
  for_chunks(in, [&](const Inputs& chunk, int64_t first) {
    Grads part_grads = grads;
    part_grads.hidden_states = grads.hidden_states.from(first * shape.hidden);
    if (grads.top_k_weights) part_grads.top_k_weights += first * shape.topk;
    BackwardChunk{.call = call, .in = chunk, .gate_up_lora = gate_up_lora, .down_lora = down_lora,
                 .saved = saved.from_slot(shape, first * shape.topk), .saved_ld = shape.slots(),
                 .grad_output = grad_output + first * shape.hidden, .grads = part_grads,
                 .gate_up_grads = gate_up_grads, .down_grads = down_grads}
        .compute();
  });
  gate_up_grads.store(call);
  down_grads.store(call);
}

}  // namespace ktlib
