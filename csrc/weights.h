// Blocks of weight rows as an operand of `multiply`: where they lie, unless the sizes are ragged for this kernel.
#pragma once

#include <cstring>

#include "kernels.h"

namespace ktlib {

struct Rows {
  const bf16* data;
  int64_t ld;
};

// rows x depth of `src`, readable and finite up to the kernel's units; copied into `scratch` (zero-padded, at least
// round_up(rows, row_unit) * round_up(depth, depth_unit)) only if it is not so already.
inline Rows padded_rows(const Kernels& k, const bf16* src, int64_t ld, int rows, int depth, bf16* scratch) {
  if (rows % k.row_unit == 0 && depth % k.depth_unit == 0) return {src, ld};
  const int64_t padded_depth = round_up(depth, k.depth_unit), padded = round_up(rows, k.row_unit);
  std::memset(scratch, 0, size_t(padded * padded_depth) * sizeof(bf16));
  for (int r = 0; r < rows; r++) std::memcpy(scratch + r * padded_depth, src + r * ld, size_t(depth) * sizeof(bf16));
  return {scratch, padded_depth};
}

}  // namespace ktlib
