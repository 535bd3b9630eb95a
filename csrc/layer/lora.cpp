#include "layer/lora.h"

#include <cstring>

#include "system/threads.h"

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

LoraForm::LoraForm(const Call& call, int64_t experts, const std::vector<int32_t>& used, const Lora& lora,
                   int64_t in, int64_t out)
    : rank(lora.rank), scaling(lora.scaling), in(in), out(out) {
  if (rank == 0) return;
  const Kernels& k = call.kernels;
  rows = int(round_up(2 * rank, k.row_unit));
  depth = int(round_up(2 * rank, k.depth_unit));
  in_depth = round_up(in, k.depth_unit);
  A = Buffer<bf16>(experts * rows * in_depth, call.threads);
  B = Buffer<bf16>((experts * out + k.row_unit) * depth, call.threads);

  parallel_tasks(call, int64_t(used.size()), [&](int64_t task, int) {
    const int64_t expert = used[task];
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
  parallel_tasks(call, (out + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const int64_t last = std::min(out, (task + 1) * kBlock);
    for (int expert : used)
      for (int64_t o = task * kBlock; o < last; o++) {
        bf16* row = B + (int64_t(expert) * out + o) * depth;
        for (int r = 0; r < rank; r++) row[r] = row[rank + r] = load(lora.B, (o * rank + r) * experts + expert);
        for (int r = 2 * rank; r < depth; r++) row[r] = bf16{0};
      }
  });
}

void low_half(float* low, const float* values, int64_t ld, int rows, int columns) {
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < columns; i++) {
      const float value = values[r * ld + i];
      low[r * ld + i] = value - to_float(to_bf16(value));
    }
}

LoraGrads::LoraGrads(const Lora& lora, const Matrix& A, const Matrix& B, int64_t in, int64_t out, int64_t experts)
    : A(A), B(B), rank(lora.rank), in(in), out(out), experts(experts), touched(size_t(experts), 0) {
  if (A) sumA = Buffer<float>(experts * rank * in);
  if (B) sumBt = Buffer<float>(experts * rank * out);
}

void LoraGrads::reserve(int64_t blocks) {
  dA = Buffer<float>(A ? blocks * rank * in : 0);
  dBt = Buffer<float>(B ? blocks * rank * out : 0);
}

void LoraGrads::add(const Call& call, const std::vector<Task>& blocks) {
  if (!A && !B) return;
  struct Range {
    int expert, first, count;
  };
  std::vector<Range> ranges;  // an expert's blocks are consecutive
  for (const Task& task : blocks) {
    if (ranges.empty() || ranges.back().expert != task.expert) ranges.push_back({task.expert, task.row_block, 0});
    ranges.back().count++;
  }
  parallel_tasks(call, int64_t(ranges.size()), [&](int64_t index, int) {
    const Range& range = ranges[index];
    auto sum = [&](const Buffer<float>& partial, const Buffer<float>& total, int64_t size) {
      float* dst = total + range.expert * size;
      const float* src = partial + range.first * size;
      if (!touched[range.expert]) std::memcpy(dst, src, size_t(size) * sizeof(float));
      for (int p = touched[range.expert] ? 0 : 1; p < range.count; p++)
        for (int64_t i = 0; i < size; i++) dst[i] += src[p * size + i];
    };
    if (A) sum(dA, sumA, rank * in);
    if (B) sum(dBt, sumBt, rank * out);
    touched[range.expert] = 1;
  });
}

void LoraGrads::store(const Call& call) const {
  if (A)
    parallel_tasks(call, experts, [&](int64_t expert, int) {
      const int64_t size = rank * in;
      float* fp32 = A.fp32 ? static_cast<float*>(A.data) + expert * size : nullptr;
      bf16* half = A.fp32 ? nullptr : static_cast<bf16*>(A.data) + expert * size;
      if (!touched[expert])
        std::memset(A.fp32 ? static_cast<void*>(fp32) : half, 0, size_t(size) * (A.fp32 ? sizeof(float) : sizeof(bf16)));
      else if (A.fp32)
        std::memcpy(fp32, sumA + expert * size, size_t(size) * sizeof(float));
      else
        call.kernels.round(half, sumA + expert * size, 1.0f, size);
    });
  if (B)
    parallel_tasks(call, (out + kBlock - 1) / kBlock, [&](int64_t task, int) {
      const int64_t last = std::min(out, (task + 1) * kBlock);
      for (int64_t expert = 0; expert < experts; expert++)
        for (int64_t r = 0; r < rank; r++) {
          const float* src = sumBt + (expert * rank + r) * out;
          for (int64_t o = task * kBlock; o < last; o++)
            ktlib::store(B, (o * rank + r) * experts + expert, touched[expert] ? src[o] : 0.0f);
        }
    });
}

}  // namespace ktlib
