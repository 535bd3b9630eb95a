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

  // The scales of a matrix are [ceil(rows / group_rows)][ceil(columns / group_columns)]. A tensor with some rows of an expert
  // is a matrix of its own; of several experts in one tensor each is a matrix.
  std::vector<uintptr_t> scales, zeros;  // their addresses, in the order of `tensors`
  ScaleType scale_type = ScaleType::fp32;
  int64_t group_rows = 1, group_columns = 0;

  bool is_coded() const { return format != Format::bf16; }

  // Rows [first, first + count) of an expert, columns [column, column + width), as bf16: where they lie, or, if they are
  // in more than one tensor or codes, in scratch [count][width]. ahead: see `write`.
  Rows read(const Kernels& k, int64_t expert, int64_t first, int count, int64_t column, int64_t width, bf16* scratch,
            int64_t ahead = 0) const {
    const Place place = find(expert, first);
    if (!is_coded() && place.row + count <= tensor_rows) return {plain_row(place) + column, columns};
    write(k, expert, first, count, column, width, scratch, width, ahead);
    return {scratch, width};
  }

  // The same rows to memory of the caller's. While one is written, what lies `ahead` bytes further in the codes is fetched,
  // if that is not 0.
  void write(const Kernels& k, int64_t expert, int64_t first, int count, int64_t column, int64_t width, bf16* dst,
             int64_t ldd, int64_t ahead = 0) const {
    for (int r = 0; r < count;) {
      const Place place = find(expert, first + r);
      if (!is_coded()) {
        std::memcpy(dst + r * ldd, plain_row(place) + column, size_t(width) * sizeof(bf16));
        r++;
        continue;
      }
      const int run = int(std::min<int64_t>(count - r, matrix_rows() - place.row % matrix_rows()));
      k.decode(dst + r * ldd, ldd, coded_rows(place, ahead), run, column, width);
      r += run;
    }
  }

  // Bytes from one row of codes to the next.
  int64_t row_bytes() const { return ktlib::row_bytes(format, columns); }

 private:
  struct Place {
    size_t tensor;
    int64_t row;  // of the tensor
  };
  Place find(int64_t expert, int64_t row) const {
    const int64_t all = expert * rows + row;
    return {size_t(all / tensor_rows), all % tensor_rows};
  }
  int64_t matrix_rows() const { return std::min(rows, tensor_rows); }
  const bf16* plain_row(const Place& place) const {
    return reinterpret_cast<const bf16*>(tensors[place.tensor]) + place.row * columns;
  }
  Codes coded_rows(const Place& place, int64_t ahead) const {
    const int64_t row = place.row % matrix_rows(), groups = (columns + group_columns - 1) / group_columns;
    const int64_t group_row = place.row / matrix_rows() * ((matrix_rows() + group_rows - 1) / group_rows) + row / group_rows;
    return {.format = format, .scale_type = scale_type,
            .codes = reinterpret_cast<const uint8_t*>(tensors[place.tensor]) + place.row * row_bytes(),
            .scales = reinterpret_cast<const char*>(scales[place.tensor]) + group_row * groups * scale_bytes(scale_type),
            .zeros = zeros.empty() ? nullptr : reinterpret_cast<const int8_t*>(zeros[place.tensor]) + group_row * groups,
            .group = group_columns, .group_rows = group_rows, .group_row = row % group_rows, .row_bytes = row_bytes(),
            .groups = groups, .ahead = ahead};
  }
};

// Columns of a row in scratch, for `multiply`.
inline int64_t padded_row(const Kernels& k, int64_t columns) { return row_stride<bf16>(round_up(columns, k.depth_unit)); }

// Scratch, in elements, that padding rows x columns needs.
inline int64_t padded_size(const Kernels& k, int64_t rows, int64_t columns) {
  return round_up(rows, k.row_unit) * padded_row(k, columns);
}

// Rows [first, first + count) of an expert, columns [column, column + width), as the row operand of `multiply`, readable and
// finite up to the kernel's units: where they lie, unless they are codes or the sizes are ragged for the kernel; then
// zero-padded in `scratch`. (Copying a block into scratch first, free of rows a power of two apart, was tried for AMX: 20 %
// slower at 48 tokens per expert, 10 % at 192, even at 768.)
inline Rows padded_rows(const Kernels& k, const Weight& weight, int expert, int64_t first, int count, int64_t column,
                        int64_t width, bf16* scratch, int64_t ahead = 0) {
  if (!weight.is_coded() && count % k.row_unit == 0 && width % k.depth_unit == 0)
    return weight.read(k, expert, first, count, column, width, scratch);
  const int64_t stride = padded_row(k, width), padded = round_up(width, k.depth_unit);
  weight.write(k, expert, first, count, column, width, scratch, stride, ahead);
  for (int r = 0; r < round_up(count, k.row_unit); r++) {
    const int64_t filled = r < count ? width : 0;
    if (filled < padded) std::memset(scratch + r * stride + filled, 0, size_t(padded - filled) * sizeof(bf16));
  }
  return {scratch, stride};
}

}  // namespace ktlib
