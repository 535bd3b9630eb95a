// The weights of the experts, as the products read them: a few rows at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"

namespace ktlib {

struct Rows {
  const bf16* data;
  int64_t ld;
};

// One projection of all experts: a matrix [rows][columns] for each. All of them, one below the other, are cut into tensors
// of equally many rows, each anywhere in memory: one stack, a tensor for each expert, or an expert's gate and up apart.
// A tensor of codes (kernels/codes.h) has a tensor of scales beside it, and one of zeros unless there are none.
struct Weight {
  Format format = Format::bf16;
  std::vector<uintptr_t> tensors;  // their addresses, in order
  int64_t tensor_rows = 0;
  int64_t rows = 0, columns = 0;  // of one expert

  // The scales of a matrix are [ceil(rows / group_rows)][ceil(columns / group_columns)]. A tensor with a part of an expert
  // is a matrix of its own; of several experts in one tensor each is a matrix.
  std::vector<uintptr_t> scales, zeros;  // their addresses, in the order of `tensors`
  ScaleType scale_type = ScaleType::fp32;
  int64_t group_rows = 1, group_columns = 0;

  bool is_coded() const { return format != Format::bf16; }

  // Rows [first, first + count) of an expert, columns [column, column + width), as bf16: where they lie, or, if they are
  // in more than one tensor or codes, in scratch [count][width].
  Rows read(const Kernels& k, int64_t expert, int64_t first, int count, int64_t column, int64_t width,
            bf16* scratch) const {
    const Place place = find(expert, first);
    if (!is_coded() && place.row + count <= tensor_rows) return {plain_row(place) + column, columns};
    for (int r = 0; r < count; r++) write_row(k, expert, first + r, column, width, scratch + r * width);
    return {scratch, width};
  }

  // One such row in memory of the caller's.
  void write_row(const Kernels& k, int64_t expert, int64_t row, int64_t column, int64_t width, bf16* dst) const {
    const Place place = find(expert, row);
    if (is_coded())
      k.decode(dst, coded_row(place), column, width);
    else
      std::memcpy(dst, plain_row(place) + column, size_t(width) * sizeof(bf16));
  }

 private:
  struct Place {
    size_t tensor;
    int64_t row;  // of the tensor
  };
  Place find(int64_t expert, int64_t row) const {
    const int64_t all = expert * rows + row;
    return {size_t(all / tensor_rows), all % tensor_rows};
  }
  const bf16* plain_row(const Place& place) const {
    return reinterpret_cast<const bf16*>(tensors[place.tensor]) + place.row * columns;
  }
  Codes coded_row(const Place& place) const {
    const int64_t matrix_rows = std::min(rows, tensor_rows);
    const int64_t scale_rows = (matrix_rows + group_rows - 1) / group_rows;
    const int64_t groups = (columns + group_columns - 1) / group_columns;
    const int64_t group =
        (place.row / matrix_rows * scale_rows + place.row % matrix_rows / group_rows) * groups;
    const int64_t scale_bytes = scale_type == ScaleType::fp32 ? 4 : scale_type == ScaleType::e8m0 ? 1 : 2;
    return {.format = format, .scale_type = scale_type,
            .codes = reinterpret_cast<const uint8_t*>(tensors[place.tensor]) + place.row * row_bytes(format, columns),
            .scales = reinterpret_cast<const char*>(scales[place.tensor]) + group * scale_bytes,
            .zeros = zeros.empty() ? nullptr : reinterpret_cast<const int8_t*>(zeros[place.tensor]) + group,
            .group = group_columns};
  }
};

// Scratch, in elements, that padding rows x depth needs.
inline int64_t padded_size(const Kernels& k, int64_t rows, int64_t depth) {
  return round_up(rows, k.row_unit) * round_up(depth, k.depth_unit);
}

// Rows [first, first + count) of an expert as the row operand of `multiply`, readable and finite up to the kernel's units:
// where they lie, unless they are codes or the sizes are ragged for the kernel; then zero-padded in `scratch`. (Copying a
// block into scratch first, free of rows a power of two apart, was tried for AMX: 20 % slower at 48 tokens per expert, 10 %
// at 192, even at 768.)
inline Rows padded_rows(const Kernels& k, const Weight& weight, int expert, int64_t first, int count, bf16* scratch) {
  if (!weight.is_coded() && count % k.row_unit == 0 && weight.columns % k.depth_unit == 0)
    return weight.read(k, expert, first, count, 0, weight.columns, scratch);
  const int64_t padded = round_up(weight.columns, k.depth_unit);
  for (int r = 0; r < round_up(count, k.row_unit); r++) {
    bf16* row = scratch + r * padded;
    const int64_t filled = r < count ? weight.columns : 0;
    if (r < count) weight.write_row(k, expert, first + r, 0, filled, row);
    std::memset(row + filled, 0, size_t(padded - filled) * sizeof(bf16));
  }
  return {scratch, padded};
}

}  // namespace ktlib
