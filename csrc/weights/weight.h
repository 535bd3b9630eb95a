// Blocks of weight rows as the row operand of `multiply`: where they lie, unless the sizes are ragged for the kernel.
// (Copying a block into scratch first, free of rows a power of two apart, was tried for AMX: 20 % slower at 48 tokens
// per expert, 10 % at 192, even at 768.)
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace ktlib {

struct Rows {
  const bf16* data;
  int64_t ld;
};

// Scratch, in elements, that padding rows x depth needs.
inline int64_t padded_size(const Kernels& k, int64_t rows, int64_t depth) {
  return round_up(rows, k.row_unit) * round_up(depth, k.depth_unit);
}

// rows x depth of `src`, readable and finite up to the kernel's units: `src` itself, or a zero-padded copy in `scratch`.
inline Rows padded_rows(const Kernels& k, const bf16* src, int64_t ld, int rows, int depth, bf16* scratch) {
  if (rows % k.row_unit == 0 && depth % k.depth_unit == 0) return {src, ld};
  const int64_t padded = round_up(depth, k.depth_unit);
  for (int r = 0; r < round_up(rows, k.row_unit); r++) {
    const int filled = r < rows ? depth : 0;
    std::memcpy(scratch + r * padded, src + r * ld, size_t(filled) * sizeof(bf16));
    std::memset(scratch + r * padded + filled, 0, size_t(padded - filled) * sizeof(bf16));
  }
  return {scratch, padded};
}

}  // namespace ktlib
