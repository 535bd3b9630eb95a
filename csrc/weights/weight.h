// The weights of the experts, as the products read them: a few rows at a time.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/kernels.h"

namespace ktlib {

struct Rows {
  const bf16* data;
  int64_t ld;
};

enum class Format : int { bf16 = 0 };

// One projection of all experts: a matrix [rows][columns] for each. All of them, one below the other, are cut into tensors
// of equally many rows, each anywhere in memory: one stack, a tensor for each expert, or an expert's gate and up apart.
struct Weight {
  Format format = Format::bf16;
  std::vector<uintptr_t> tensors;  // their addresses, in order
  int64_t tensor_rows = 0;
  int64_t rows = 0, columns = 0;  // of one expert

  // Rows [first, first + count) of an expert, columns [column, column + width), as bf16: where they lie, or, if they are
  // in more than one tensor, in scratch [count][width].
  Rows read(int64_t expert, int64_t first, int count, int64_t column, int64_t width, bf16* scratch) const {
    const int64_t row = expert * rows + first, tensor = row / tensor_rows, offset = row - tensor * tensor_rows;
    if (offset + count <= tensor_rows)
      return {reinterpret_cast<const bf16*>(tensors[size_t(tensor)]) + offset * columns + column, columns};
    for (int r = 0; r < count; r++)
      std::memcpy(scratch + r * width, read(expert, first + r, 1, column, width, nullptr).data,
                  size_t(width) * sizeof(bf16));
    return {scratch, width};
  }
};

// Scratch, in elements, that padding rows x depth needs.
inline int64_t padded_size(const Kernels& k, int64_t rows, int64_t depth) {
  return round_up(rows, k.row_unit) * round_up(depth, k.depth_unit);
}

// Rows [first, first + count) of an expert as the row operand of `multiply`, readable and finite up to the kernel's units:
// where they lie, unless the sizes are ragged for the kernel; then zero-padded in `scratch`. (Copying a block into scratch
// first, free of rows a power of two apart, was tried for AMX: 20 % slower at 48 tokens per expert, 10 % at 192, even at
// 768.)
inline Rows padded_rows(const Kernels& k, const Weight& weight, int expert, int64_t first, int count, bf16* scratch) {
  if (count % k.row_unit == 0 && weight.columns % k.depth_unit == 0)
    return weight.read(expert, first, count, 0, weight.columns, scratch);
  const int64_t padded = round_up(weight.columns, k.depth_unit);
  for (int r = 0; r < round_up(count, k.row_unit); r++) {
    bf16* row = scratch + r * padded;
    const int64_t filled = r < count ? weight.columns : 0;
    if (r < count)
      std::memcpy(row, weight.read(expert, first + r, 1, 0, filled, row).data, size_t(filled) * sizeof(bf16));
    std::memset(row + filled, 0, size_t(padded - filled) * sizeof(bf16));
  }
  return {scratch, padded};
}

}  // namespace ktlib
