// Portable C++: runs anywhere and defines the meaning of every entry of the table.
#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 2;

#include "kernels/common-inl.h"
#include "kernels/decode-inl.h"
#include "kernels/loops-inl.h"

// Blocks of 4 rows x 16 columns: wide enough for the compiler's baseline vectors, small enough for its registers.
template <int Rows>
void multiply_block(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* group, int depth, bool accumulate) {
  float sum[Rows][kColumns];
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < kColumns; j++) sum[r][j] = accumulate ? c[r * ldc + j] : 0.0f;
  for (int d = 0; d < depth; d += 2) {
    const bf16* pairs = group + d * kColumns;
    for (int r = 0; r < Rows; r++) {
      // As one load: GCC 12 at -O3 makes two into vectors of rows, of which it reads some that do not exist.
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * lda + d, 4);
      const float even = bits_to_float(pair << 16), odd = bits_to_float(pair & 0xffff0000u);
      for (int j = 0; j < kColumns; j++)
        sum[r][j] += even * to_float(pairs[2 * j]) + odd * to_float(pairs[2 * j + 1]);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < kColumns; j++) c[r * ldc + j] = sum[r][j];
}

void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int width,
              int rows, int depth, bool accumulate) {
  for (int j = 0; j < width; j += kColumns) {
    const bf16* group = panel + j * panel_depth;
    int r = 0;
    for (; r + 4 <= rows; r += 4) multiply_block<4>(c + r * ldc + j, ldc, a + r * lda, lda, group, depth, accumulate);
    for (; r < rows; r++) multiply_block<1>(c + r * ldc + j, ldc, a + r * lda, lda, group, depth, accumulate);
  }
}

}  // namespace

const Kernels& kernels_portable() {
  static const Kernels table = {
      .isa = "portable", .panel_width = 32, .row_unit = 1, .depth_unit = kDepthUnit,
      .pack_rows = pack_rows, .pack_pairs = pack_pairs, .multiply = multiply,
      .unpermute = unpermute, .activate = activate, .interleave = interleave,
      .store_rows_bf16 = store_rows_bf16, .store_rows_f32 = store_rows_f32, .round = round_to_bf16, .widen = widen,
      .gate_backward = gate_backward, .rank_grad_bf16 = rank_grad<bf16>, .rank_grad_f32 = rank_grad<float>,
      .combine = combine, .keep_mask = keep_mask, .decode = decode<ScalarRuns>,
  };
  return table;
}

}  // namespace ktlib
