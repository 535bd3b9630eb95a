#include "layer/dropout.h"

#include <algorithm>

#include "system/threads.h"

namespace ktlib {

void multiply_kept(const Kernels& k, const InputMask& mask, float* c, const LoraForm& lora, int expert,
                   const bf16* panel, int width, int64_t row, int tokens, bf16* scratch) {
  bf16 *rows = scratch, *kept = scratch + kMaxWidth * kKeptDepth;
  for (int first = 0; first < lora.in_depth; first += kKeptDepth) {
    const int count = int(std::min<int64_t>(kKeptDepth, lora.in - first));
    const int depth = int(std::min<int64_t>(kKeptDepth, lora.in_depth - first));
    mask.fill(rows, kKeptDepth, row, tokens, first, count);
    k.pack_rows(kept, width, rows, kKeptDepth, nullptr, tokens, count);
    for (int i = 0; i < width; i += kColumns) {
      bf16* group = kept + int64_t(i) * depth;
      keep(group, group, panel + i * lora.in_depth + first * kColumns, int64_t(depth) * kColumns);
    }
    k.multiply(c, width, lora.a(expert) + first, lora.in_depth, kept, depth, width, lora.rank, depth, first > 0);
  }
}

void keep_masks(const Call& call, bf16* masks, const Dropout& dropout, uint32_t projection,
                const int64_t* slots, int64_t rows, int columns) {
  parallel_tasks({call.kernels, threads_here(call.threads)}, rows, [&](int64_t row, int) {
    call.kernels.keep_mask(masks + row * columns, dropout, projection, slots[row], 0, columns);
  });
}

}  // namespace ktlib
