// Backward pass: layer/forward_in_place.cpp in reverse. Tokens are the row operand now; blocks of weight rows are interleaved on the
// fly into a panel small enough for L1 and meet every token of the expert there, so weights are read once.
//
//     dh = grad_output . W_down                        (the routing weight is applied to dh in fp32)
//     d(weight) = <dh, h> + <grad_output, down_bias>   (so the expert's output need not be saved)
//     dgate, dup = act'(gate, up, weight * dh)
//     dx = [dgate dup] . W_gate_up
//
// A LoRA pair adds its term to the same accumulators, as `rank` more rows of the contraction, and its gradients are
// products over the tokens of an expert, taken block by block where the other factor is at hand. With dropout on the
// pair's input that term is a product of its own, of which the mask keeps a part.
#include <cstring>

#include "layer/bias.h"
#include "layer/combine.h"
#include "layer/dropout.h"
#include "layer/lora.h"
#include "layer/moe.h"
#include "system/threads.h"
#include "layer/routing.h"
#include "layer/row_products.h"
#include "layer/weight_grads.h"

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
// for the product with lora_A. High part, then low part.
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
void inner_for_A(const Kernels& k, const LoraForm& lora, const Task& task, const bf16* d_out, int64_t ld,
                 const float* weights, const Inner& inner, bf16* panel, float* c) {
  lora_inner(k, lora, {d_out, ld, lora.b(task.expert), lora.depth, int(lora.out), false}, task.rows, weights,
             inner.rows + task.row * lora.depth, inner.for_A + task.row, inner.ld, panel, c);
}

// The term of one LoRA pair in the gradient of its input, columns [first, ...).
Term lora_term(const LoraForm& lora, const Task& task, const Inner& inner, int64_t first) {
  if (!lora) return {};
  return {inner.rows + task.row * lora.depth, lora.depth, lora.a(task.expert) + first, lora.in_depth, 2 * lora.rank,
          false};
}

// c[rows][columns] (ld kLdc) += what the mask [rows][kColumnsOut] keeps of the term. product: as much scratch as c.
void add_kept_term(const Kernels& k, float* c, int rows, int columns, const Term& term, const bf16* mask,
                   float* product, bf16* panel) {
  sum_of_products(k, product, rows, columns, {term}, panel);
  for (int i = 0; i < rows; i++) add_kept(c + i * kLdc, product + i * kLdc, mask + i * kColumnsOut, columns);
}

// One part of the batch. saved_ld: slots of the whole batch.
void backward_part(const Kernels& k, int threads, const Shape& shape, const Inputs& in, const LoraForm& gate_up_lora,
                   const LoraForm& down_lora, const Saved& saved, int64_t saved_ld, const bf16* grad_output,
                   const Grads& grads, LoraGrads& gate_up_grads, LoraGrads& down_grads) {
  const Plan plan(shape, in);
  const int hidden = int(shape.hidden), inter = int(shape.inter);
  const int64_t rows = plan.rows();
  const int64_t hidden_stride = row_stride<bf16>(hidden), gate_up_stride = row_stride<bf16>(2 * inter);
  const Inner gate_up_inner(k, gate_up_lora, rows), down_inner(k, down_lora, rows);
  const std::vector<Task> blocks = row_tasks(plan, kRows);
  gate_up_grads.reserve(int64_t(blocks.size()));
  down_grads.reserve(int64_t(blocks.size()));
  const bool want_x = bool(grads.hidden_states);
  const bool want_gate_up_inner = gate_up_lora && (want_x || gate_up_grads.A);
  const int inter_blocks = (inter + kColumnsOut - 1) / kColumnsOut;

  const Buffer<bf16> dy((rows + k.row_unit) * hidden_stride, threads);      // [row][hidden]: grad_output, sorted
  const Buffer<bf16> d_gate_up((rows + k.row_unit) * gate_up_stride, threads);  // [row][2 * inter]
  const int range = output_range(rows, hidden);
  const Buffer<float> dx(want_x ? rows * range : 0, threads);              // [row][range]
  const bool bias_matters = in.down_bias && grads.top_k_weights;
  const int partials = inter_blocks + (bias_matters ? 1 : 0);
  const Buffer<float> d_weight(rows * partials);                           // [row][block]: partial <dh, h>; <dy, bias>
  const Buffer<float> weight(rows);                                        // [row]
  const ThreadBuffer<float> c_scratch(threads, (kRows + k.row_unit) * kLdc);
  const ThreadBuffer<bf16> panel_scratch(threads, kPanels);
  const InputMask x_mask(k, in, gate_up_lora, plan, InputMask::gate_up), h_mask(k, in, down_lora, plan, InputMask::down);
  const bool masked = x_mask || h_mask;
  const ThreadBuffer<bf16> mask_scratch(threads, masked ? int64_t(kRows) * kColumnsOut : 0);
  const ThreadBuffer<float> term_scratch(threads, masked ? (kRows + k.row_unit) * kLdc : 0);

  // 1. sort grad_output and the routing weights; inner values of down
  const std::vector<Task> row_blocks = row_tasks(plan, kRowsSmall);
  parallel_tasks(k, threads, int64_t(row_blocks.size()), [&](int64_t index, int thread) {
    const Task& task = row_blocks[index];
    for (int64_t row = task.row; row < task.row + task.rows; row++) {
      weight[row] = in.top_k_weights[plan.slot_of_row[row]];
      std::memcpy(dy + row * hidden_stride, grad_output + plan.token_of_row[row] * shape.hidden,
                  size_t(hidden) * sizeof(bf16));
      std::memset(dy + row * hidden_stride + hidden, 0, size_t(hidden_stride - hidden) * sizeof(bf16));
      std::memset(d_gate_up + row * gate_up_stride + 2 * inter, 0, size_t(gate_up_stride - 2 * inter) * sizeof(bf16));
      if (bias_matters)
        d_weight[row * partials + inter_blocks] =
            dot_bias(in.down_bias, task.expert * shape.hidden, dy + row * hidden_stride, hidden);
    }
    if (gate_up_grads.B)
      inner_for_B(gate_up_lora, task, saved.t_gate_up, saved_ld, nullptr, gate_up_inner);
    if (down_grads.B) inner_for_B(down_lora, task, saved.t_down, saved_ld, weight + task.row, down_inner);
    if (down_lora)
      inner_for_A(k, down_lora, task, dy + task.row * hidden_stride, hidden_stride, weight + task.row, down_inner,
                  panel_scratch[thread], c_scratch[thread]);
  });

  // 2. dh, d(weight), dgate and dup; gradients of down's lora_A and gate_up's lora_B
  const std::vector<Task> inter_tasks = block_tasks(plan, kRows, inter, kColumnsOut);
  parallel_tasks(k, threads, int64_t(inter_tasks.size()), [&](int64_t index, int thread) {
    const Task& task = inter_tasks[index];
    bf16* panel = panel_scratch[thread];
    float* dh = c_scratch[thread];  // [rows][kLdc]
    const bf16* w = in.down_proj + int64_t(task.expert) * hidden * inter;
    const Term of_lora = lora_term(down_lora, task, down_inner, task.first);
    sum_of_products(k, dh, task.rows, task.count,
                    {term(dy + task.row * hidden_stride, hidden_stride, w, hidden, inter, task.first, in.transposed),
                     h_mask ? Term{} : of_lora},
                    panel);
    const bf16* mask = mask_scratch[thread];
    if (h_mask) {
      h_mask.fill(mask_scratch[thread], kColumnsOut, task.row, task.rows, task.first, task.count);
      add_kept_term(k, dh, task.rows, task.count, of_lora, mask, term_scratch[thread], panel);
    }
    const GateUp block(in, inter, task.first, task.count);
    for (int i = 0; i < task.rows; i++) {
      const int64_t row = task.row + i;
      const bf16* gate_up = saved.gate_up + row * 2 * inter;
      bf16* d_row = d_gate_up + row * gate_up_stride;
      for (const GateUp::Range& range : block) {  // short runs of far rows, which no hardware prefetcher foresees
        prefetch<false>(gate_up + kRowsAhead * 2 * inter + range.first, range.count);
        prefetch<true>(d_row + kRowsAhead * gate_up_stride + range.first, range.count);
      }
      float& partial = d_weight[row * partials + task.first / kColumnsOut];
      partial = k.gate_backward(in.gate, dh + i * kLdc, gate_up + block.gate, gate_up + block.up, block.step,
                                weight[row], d_row + block.gate, d_row + block.up, task.count);
      if (h_mask) partial += zero_times(term_scratch[thread] + i * kLdc, task.count);
    }
    if (down_grads.A) {  // gate_backward left h in dh
      for (int i = 0; h_mask && i < task.rows; i++) keep(dh + i * kLdc, mask + i * kColumnsOut, task.count);
      k.rank_grad_f32(down_grads.a(task.part) + task.first, inter, down_lora.rank, down_inner.for_A + task.row,
                      down_inner.ld, dh, kLdc, nullptr, task.rows, task.count);
    }
    if (gate_up_grads.B)
      for (const GateUp::Range& range : block)
        k.rank_grad_bf16(gate_up_grads.bt(task.part) + range.first, 2 * inter, gate_up_lora.rank,
                         gate_up_inner.for_B + task.row, gate_up_inner.ld,
                         d_gate_up + task.row * gate_up_stride + range.first, gate_up_stride, nullptr, task.rows,
                         range.count);
  });

  // 3. inner values of gate_up
  if (want_gate_up_inner)
    parallel_tasks(k, threads, int64_t(row_blocks.size()), [&](int64_t index, int thread) {
      const Task& task = row_blocks[index];
      inner_for_A(k, gate_up_lora, task, d_gate_up + task.row * gate_up_stride, gate_up_stride, nullptr,
                  gate_up_inner, panel_scratch[thread], c_scratch[thread]);
    });

  // 4. dx by rows; gradients of gate_up's lora_A and down's lora_B
  for (int first = 0; first < hidden && (want_x || gate_up_grads.A || down_grads.B); first += range) {
    const int count = std::min(range, hidden - first);
    const std::vector<Task> hidden_tasks = block_tasks(plan, kRows, count, kColumnsOut);
    parallel_tasks(k, threads, int64_t(hidden_tasks.size()), [&](int64_t index, int thread) {
      const Task& task = hidden_tasks[index];
      const int64_t feature = first + task.first;
      bf16* panel = panel_scratch[thread];
      bf16* mask = mask_scratch[thread];
      if (x_mask && (want_x || gate_up_grads.A))
        x_mask.fill(mask, kColumnsOut, task.row, task.rows, int(feature), task.count);
      if (want_x) {
        float* c = c_scratch[thread];
        const bf16* w = in.gate_up_proj + task.expert * 2 * shape.inter * hidden;
        const Term of_lora = lora_term(gate_up_lora, task, gate_up_inner, feature);
        sum_of_products(k, c, task.rows, task.count,
                        {term(d_gate_up + task.row * gate_up_stride, gate_up_stride, w, 2 * inter, hidden, feature,
                              in.transposed),
                         x_mask ? Term{} : of_lora},
                        panel);
        if (x_mask) add_kept_term(k, c, task.rows, task.count, of_lora, mask, term_scratch[thread], panel);
        for (int i = 0; i < task.rows; i++)
          std::memcpy(dx + (task.row + i) * range + task.first, c + i * kLdc, size_t(task.count) * sizeof(float));
      }
      if (gate_up_grads.A) {
        const bf16* x = in.hidden_states + feature;
        const int32_t* tokens = plan.token_of_row.data() + task.row;
        for (int i = 0; x_mask && i < task.rows; i++)
          keep(mask + i * kColumnsOut, mask + i * kColumnsOut, x + tokens[i] * shape.hidden, task.count);
        k.rank_grad_bf16(gate_up_grads.a(task.part) + feature, hidden, gate_up_lora.rank,
                         gate_up_inner.for_A + task.row, gate_up_inner.ld, x_mask ? mask : x,
                         x_mask ? kColumnsOut : hidden, x_mask ? nullptr : tokens, task.rows, task.count);
      }
      if (down_grads.B)
        k.rank_grad_bf16(down_grads.bt(task.part) + feature, hidden, down_lora.rank, down_inner.for_B + task.row,
                         down_inner.ld, dy + task.row * hidden_stride + feature, hidden_stride, nullptr, task.rows,
                         task.count);
    });

    // 5. sum over slots, in slot order
    if (want_x) combine_tokens(k, threads, plan, shape, dx, range, nullptr, grads.hidden_states, first, count);
  }

  // 6. sums over blocks, in order
  const DefaultFloats floats;
  for (int64_t slot = 0; grads.top_k_weights && slot < shape.slots(); slot++) {
    const int64_t row = plan.row_of_slot[slot];
    float sum = 0.0f;
    for (int b = 0; row >= 0 && b < partials; b++) sum += d_weight[row * partials + b];
    grads.top_k_weights[slot] = sum;
  }
  gate_up_grads.add(k, threads, blocks);
  down_grads.add(k, threads, blocks);

  // 7. gradients of the biases and of the weights
  bias_grads(k, threads, plan, shape, dy.get(), hidden_stride, weight.get(), d_gate_up.get(), gate_up_stride, grads);
  weight_grads(k, threads, plan, shape, in, saved.gate_up, dy.get(), hidden_stride, weight.get(), d_gate_up.get(),
               gate_up_stride, grads);
}

}  // namespace

void backward(const Kernels& k, int threads, const Shape& shape, const Inputs& in, const Saved& saved,
              const bf16* grad_output, const Grads& grads, bool whole) {
  const std::vector<int32_t> used = used_experts(shape, in);
  threads = useful_threads(shape, threads);
  if (grads.hidden_states)
    populate(threads, grads.hidden_states.data, shape.tokens * shape.hidden * grads.hidden_states.element_size());
  const LoraForm gate_up_lora(k, threads, shape.experts, used, in.gate_up_lora, shape.hidden, 2 * shape.inter);
  const LoraForm down_lora(k, threads, shape.experts, used, in.down_lora, shape.inter, shape.hidden);
  LoraGrads gate_up_grads(in.gate_up_lora, grads.gate_up_A, grads.gate_up_B, shape.hidden, 2 * shape.inter,
                          shape.experts);
  LoraGrads down_grads(in.down_lora, grads.down_A, grads.down_B, shape.inter, shape.hidden, shape.experts);
  for_parts(shape, whole, [&](int64_t first, int64_t tokens) {
    Shape part = shape;
    part.tokens = tokens;
    Grads part_grads = grads;
    part_grads.hidden_states = grads.hidden_states.from(first * shape.hidden);
    if (grads.top_k_weights) part_grads.top_k_weights += first * shape.topk;
    backward_part(k, threads, part, in.from_token(shape, first), gate_up_lora, down_lora,
                  saved.from_slot(shape, first * shape.topk), shape.slots(), grad_output + first * shape.hidden,
                  part_grads, gate_up_grads, down_grads);
  });
  gate_up_grads.store(k, threads);
  down_grads.store(k, threads);
}

}  // namespace ktlib
