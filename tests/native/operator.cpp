// Forward and backward of the operator on the portable kernels, without Python: small enough for valgrind, which unlike
// the sanitizers of GCC sees reads of memory that nothing was written to. Every result decides a branch, so that an
// undefined one is reported. `operator good`, or `operator undefined`: one weight is left unset, and must be reported.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/bf16.h"
#include "layer/moe.h"

using namespace ktlib;

namespace {

// Heap memory without initial values, as torch.empty gives it (std::vector would fill it).
template <class T>
struct Array {
  explicit Array(int64_t count) : count(count), data(static_cast<T*>(std::malloc(size_t(count) * sizeof(T)))) {}
  ~Array() { std::free(data); }
  int64_t count;
  T* data;
};

bf16 number(int64_t i, float scale) { return to_bf16(scale * float((i * 7919) % 101 - 50) / 50); }

void fill(Array<bf16>& array, float scale) {
  for (int64_t i = 0; i < array.count; i++) array.data[i] = number(i, scale);
}

int not_finite = 0;

void look(const Array<bf16>& array) {
  for (int64_t i = 0; i < array.count; i++)
    if (!std::isfinite(to_float(array.data[i]))) not_finite++;
}

void look(const Array<float>& array) {
  for (int64_t i = 0; i < array.count; i++)
    if (!std::isfinite(array.data[i])) not_finite++;
}

void layer(const Shape& s, int rank, bool dense, bool undefined, bool transposed = false,
           bool dropout = false) {
  Array<bf16> x(s.tokens * s.hidden), dy(s.tokens * s.hidden), y(s.tokens * s.hidden), dx(s.tokens * s.hidden);
  Array<bf16> gate_up(s.experts * 2 * s.inter * s.hidden), down(s.experts * s.hidden * s.inter);
  Array<bf16> d_gate_up(dense ? gate_up.count : 0), d_down(dense ? down.count : 0);
  Array<int64_t> ids(s.slots());
  Array<float> weights(s.slots()), d_weights(s.slots());
  const int64_t ranks = s.experts * rank;
  Array<bf16> a1(ranks * s.hidden), b1(2 * s.inter * ranks), a2(ranks * s.inter), b2(s.hidden * ranks);
  Array<bf16> da1(a1.count), db1(b1.count), da2(a2.count), db2(b2.count);
  Array<bf16> saved_gate_up(s.slots() * 2 * s.inter), t1(2 * rank * s.slots()), t2(2 * rank * s.slots());
  for (Array<bf16>* array : {&x, &dy, &gate_up, &down, &a1, &b1, &a2, &b2}) fill(*array, 0.5f);
  for (int64_t i = 0; i < s.slots(); i++) ids.data[i] = (i * i) % s.experts, weights.data[i] = 0.25f;
  Array<bf16> unset(1);
  if (undefined) gate_up.data[s.hidden + 3] = unset.data[0];

  Inputs in;
  in.shape = s;
  in.hidden_states = x.data;
  in.top_k_index = ids.data;
  in.top_k_weights = weights.data;
  const auto stack = [&](const Array<bf16>& array, int64_t rows) {
    return Weight{.tensors = {uintptr_t(array.data)}, .tensor_rows = s.experts * rows, .rows = rows,
                  .columns = array.count / (s.experts * rows)};
  };
  in.gate_up_proj = stack(gate_up, transposed ? s.hidden : 2 * s.inter);
  in.down_proj = stack(down, transposed ? s.inter : s.hidden);
  in.settings.transposed = in.settings.interleaved = transposed;
  in.settings.whole = dense;
  if (dropout) in.settings.dropout = {7, uint32_t(1) << 30};
  if (rank) {
    in.gate_up_lora = {{a1.data, false}, {b1.data, false}, rank, 2.0f};
    in.down_lora = {{a2.data, false}, {b2.data, false}, rank, 2.0f};
  }
  Saved saved;
  saved.gate_up = saved_gate_up.data;
  if (rank) saved.t_gate_up = t1.data, saved.t_down = t2.data;
  Grads grads;
  grads.hidden_states = {dx.data, false};
  grads.top_k_weights = d_weights.data;
  if (rank) {
    grads.gate_up_A = {da1.data, false}, grads.gate_up_B = {db1.data, false};
    grads.down_A = {da2.data, false}, grads.down_B = {db2.data, false};
  }
  if (dense) grads.gate_up_proj = d_gate_up.data, grads.down_proj = d_down.data;

  const Call call = {kernels_portable(), 2};
  forward(call, in, {y.data, false}, saved);
  backward(call, in, saved, dy.data, grads);
  for (const Array<bf16>* array : {&y, &dx, &d_gate_up, &d_down}) look(*array);
  look(d_weights);
  if (rank)
    for (const Array<bf16>* array : {&da1, &db1, &da2, &db2}) look(*array);
}

}  // namespace

int main(int, char** arguments) {
  const bool undefined = !std::strcmp(arguments[1], "undefined");
  layer({7, 40, 24, 3, 2}, 4, false, undefined);
  layer({5, 33, 17, 4, 2}, 3, true, false);  // odd sizes, gradients of the expert weights
  layer({1, 32, 32, 8, 1}, 1, false, false);
  layer({9, 64, 40, 2, 2}, 0, false, false);  // without LoRA
  layer({7, 40, 24, 3, 2}, 4, true, false, true);  // as gpt-oss stores weights
  layer({7, 40, 24, 3, 2}, 4, false, false, false, true);  // with dropout, in both layouts
  layer({7, 40, 24, 3, 2}, 4, false, false, true, true);
  layer({60, 160, 144, 4, 2}, 2, false, false);  // enough work for a second thread
  std::printf("%d not finite\n", not_finite);
  return not_finite > 0;
}
