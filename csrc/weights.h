// Blocks of weight rows as the row operand of `multiply`: where they lie, or staged in scratch.
#pragma once

#include <cstring>

#include "kernels.h"

namespace ktlib {

struct Rows {
  const bf16* data;
  int64_t ld;
};

// Scratch, in elements, that staging rows x depth needs.
inline int64_t staged_size(const Kernels& k, int64_t rows, int64_t depth) {
  return round_up(rows, k.row_unit) * row_stride<bf16>(round_up(depth, k.depth_unit));
}

// rows x depth of `src`, readable and finite up to the kernel's units; copied into `scratch` (zero-padded) if the kernel
// wants its rows staged or the sizes are ragged for it.
inline Rows staged_rows(const Kernels& k, const bf16* src, int64_t ld, int rows, int depth, bf16* scratch) {
  if (!k.stage_rows && rows % k.row_unit == 0 && depth % k.depth_unit == 0) return {src, ld};
  const int64_t padded = round_up(depth, k.depth_unit), stride = row_stride<bf16>(padded);
  for (int r = 0; r < round_up(rows, k.row_unit); r++) {
    const int filled = r < rows ? depth : 0;
    std::memcpy(scratch + r * stride, src + r * ld, size_t(filled) * sizeof(bf16));
    std::memset(scratch + r * stride + filled, 0, size_t(padded - filled) * sizeof(bf16));
  }
  return {scratch, stride};
}

}  // namespace ktlib
