// The AMX micro-kernel over tile operations (kernels/tiles.h), for hardware and for emulated tiles. Included inside the using
// file's anonymous namespace, after the file's kDepthUnit (32, one tile of pairs).

// RowTiles x ColumnTiles accumulators in tiles 0..3, A in 4..5, B in 6..7.
template <class Tiles, int RowTiles, int ColumnTiles>
inline void tile_block(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* group, int64_t group_size, int depth,
                       bool accumulate) {
  const int64_t c_stride = ldc * int64_t(sizeof(float)), a_stride = lda * 2, b_stride = 2 * kColumns * int64_t(sizeof(bf16));
  float* c1 = c + 16 * ldc;
  if (accumulate) {
    Tiles::template load<0>(c, c_stride);
    if constexpr (ColumnTiles > 1) Tiles::template load<1>(c + 16, c_stride);
    if constexpr (RowTiles > 1) Tiles::template load<2>(c1, c_stride);
    if constexpr (RowTiles > 1 && ColumnTiles > 1) Tiles::template load<3>(c1 + 16, c_stride);
  } else {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
  for (int d = 0; d < depth; d += kDepthUnit) {
    const bf16* b = group + d * kColumns;
    Tiles::template load<4>(a + d, a_stride);
    Tiles::template load<6>(b, b_stride);
    Tiles::template dot<0, 4, 6>();
    if constexpr (ColumnTiles > 1) {
      Tiles::template load<7>(b + group_size, b_stride);
      Tiles::template dot<1, 4, 7>();
    }
    if constexpr (RowTiles > 1) {
      Tiles::template load<5>(a + 16 * lda + d, a_stride);
      Tiles::template dot<2, 5, 6>();
      if constexpr (ColumnTiles > 1) Tiles::template dot<3, 5, 7>();
    }
  }
  Tiles::template store<0>(c, c_stride);
  if constexpr (ColumnTiles > 1) Tiles::template store<1>(c + 16, c_stride);
  if constexpr (RowTiles > 1) Tiles::template store<2>(c1, c_stride);
  if constexpr (RowTiles > 1 && ColumnTiles > 1) Tiles::template store<3>(c1 + 16, c_stride);
}

// Depth in steps, so that 32 columns of a panel's step stay in L1 while all rows meet them.
constexpr int kDepthStep = 512;

template <class Tiles>
void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int width,
              int rows, int depth, bool accumulate) {
  const int64_t group_size = kColumns * panel_depth;
  for (int d = 0; d < depth; d += kDepthStep) {
    const int step = depth - d < kDepthStep ? depth - d : kDepthStep;
    const bool add = accumulate || d > 0;
    for (int j = 0; j < width; j += 32) {
      const bf16* b = panel + j * panel_depth + d * kColumns;
      for (int r = 0; r < rows; r += 32) {
        const bf16* rows_a = a + r * lda + d;
        float* block_c = c + r * ldc + j;
        if (r + 16 < rows && j + 16 < width)
          tile_block<Tiles, 2, 2>(block_c, ldc, rows_a, lda, b, group_size, step, add);
        else if (r + 16 < rows)
          tile_block<Tiles, 2, 1>(block_c, ldc, rows_a, lda, b, group_size, step, add);
        else if (j + 16 < width)
          tile_block<Tiles, 1, 2>(block_c, ldc, rows_a, lda, b, group_size, step, add);
        else
          tile_block<Tiles, 1, 1>(block_c, ldc, rows_a, lda, b, group_size, step, add);
      }
    }
  }
}

template <class Tiles>
int64_t burn(int64_t iterations) {
  alignas(64) const bf16 zeros[16 * 32] = {};
  Tiles::template load<4>(zeros, 64);
  Tiles::template load<5>(zeros, 64);
  Tiles::template load<6>(zeros, 64);
  Tiles::template load<7>(zeros, 64);
  for (int64_t n = 0; n < iterations; n++) {
    Tiles::template dot<0, 4, 6>();
    Tiles::template dot<1, 4, 7>();
    Tiles::template dot<2, 5, 6>();
    Tiles::template dot<3, 5, 7>();
  }
  return iterations * 4 * 2 * 16 * 16 * 32;
}
