#include "lora.h"

#include <cstring>

namespace ktlib {
namespace {

bf16 load(const Matrix& m, int64_t i) {
  return m.fp32 ? to_bf16(static_cast<const float*>(m.data)[i]) : static_cast<const bf16*>(m.data)[i];
}

void store(const Matrix& m, int64_t i, float value) {
  if (m.fp32)
    static_cast<float*>(m.data)[i] = value;
  else
    static_cast<bf16*>(m.data)[i] = to_bf16(value);
}

constexpr int kBlock = 16;  // rows of B that one task turns: their r * E columns stay in L1

}  // namespace

LoraForm::LoraForm(const Kernels& k, int threads, const Plan& plan, const Lora& lora, int64_t in, int64_t out)
    : rank(lora.rank), scaling(lora.scaling), in(in), out(out) {
  if (rank == 0) return;
  const int64_t experts = int64_t(plan.begin.size()) - 1;
  rows = int(round_up(2 * rank, k.row_unit));
  depth = int(round_up(2 * rank, k.depth_unit));
  in_depth = round_up(in, k.depth_unit);
  A = Buffer<bf16>(experts * rows * in_depth);
  B = Buffer<bf16>((experts * out + k.row_unit) * depth);

  parallel_tasks(k, threads, int64_t(plan.active.size()), [&](int64_t task, int) {
    const int64_t expert = plan.active[task];
    for (int64_t r = 0; r < rows; r++) {
      bf16* row = A + (expert * rows + r) * in_depth;
      const int64_t filled = r < 2 * rank ? in : 0;
      const int64_t source = (expert * rank + r % rank) * in;
      if (filled && lora.A.fp32)
        k.round(row, static_cast<const float*>(lora.A.data) + source, 1.0f, in);
      else if (filled)
        std::memcpy(row, static_cast<const bf16*>(lora.A.data) + source, size_t(in) * sizeof(bf16));
      std::memset(row + filled, 0, size_t(in_depth - filled) * sizeof(bf16));
    }
  });
  parallel_tasks(k, threads, (out + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const int64_t last = std::min(out, (task + 1) * kBlock);
    for (int expert : plan.active)
      for (int64_t o = task * kBlock; o < last; o++) {
        bf16* row = B + (int64_t(expert) * out + o) * depth;
        for (int r = 0; r < rank; r++) row[r] = row[rank + r] = load(lora.B, (o * rank + r) * experts + expert);
        for (int r = 2 * rank; r < depth; r++) row[r] = bf16{0};
      }
  });
}

void low_part(float* low, const float* values, int64_t ld, int rows, int columns) {
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < columns; i++) {
      const float value = values[r * ld + i];
      low[r * ld + i] = value - to_float(to_bf16(value));
    }
}

LoraGrads::LoraGrads(const Lora& lora, const Matrix& A, const Matrix& B, int64_t in, int64_t out, int64_t parts)
    : A(A), B(B), rank(lora.rank), in(in), out(out) {
  if (A) dA = Buffer<float>(parts * rank * in);
  if (B) dBt = Buffer<float>(parts * rank * out);
}

void LoraGrads::store(const Kernels& k, int threads, const std::vector<Task>& parts, int64_t experts) const {
  std::vector<int> first(experts, 0), count(experts, 0);  // each expert's parts are consecutive
  for (const Task& task : parts) {
    if (count[task.expert]++ == 0) first[task.expert] = task.part;
  }
  auto sum = [&](const float* base, int64_t size, int64_t expert, int64_t i) {
    float total = 0.0f;
    for (int p = 0; p < count[expert]; p++) total += base[(first[expert] + p) * rank * size + i];
    return total;
  };
  if (A)
    parallel_tasks(k, threads, experts * rank, [&](int64_t row, int) {
      const int64_t expert = row / rank, r = row % rank;
      for (int64_t i = 0; i < in; i++) ktlib::store(A, row * in + i, sum(dA.get(), in, expert, r * in + i));
    });
  if (B)
    parallel_tasks(k, threads, (out + kBlock - 1) / kBlock, [&](int64_t task, int) {
      const int64_t last = std::min(out, (task + 1) * kBlock);
      for (int64_t expert = 0; expert < experts; expert++)
        for (int64_t r = 0; r < rank; r++)
          for (int64_t o = task * kBlock; o < last; o++)
            ktlib::store(B, (o * rank + r) * experts + expert, sum(dBt.get(), out, expert, r * out + o));
    });
}

}  // namespace ktlib
