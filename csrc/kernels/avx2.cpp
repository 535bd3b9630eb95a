// AVX2 and FMA: Haswell (2013), Zen (2017) and everything later. A bf16 pair is widened to two fp32 and takes two FMAs;
// packers and stores are the plain loops, a small part of the time.
#include <immintrin.h>

#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 2;

#include "kernels/common-inl.h"
#include "kernels/decode-inl.h"
#include "kernels/decode-avx2-inl.h"
#include "kernels/loops-inl.h"

inline __m256 even_half(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd_half(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}

// Rows x 16 accumulators: 4 rows take 8 of the 16 registers, the widened operands 6.
template <int Rows>
inline void tile(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* group, int depth, bool accumulate) {
  __m256 sum[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) sum[r][v] = accumulate ? _mm256_loadu_ps(c + r * ldc + 8 * v) : _mm256_setzero_ps();
  for (int d = 0; d < depth; d += 2) {
    const bf16* pairs = group + d * kColumns;
    __m256 even[2], odd[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 16 * v));
      even[v] = even_half(raw);
      odd[v] = odd_half(raw);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      int pair;
      __builtin_memcpy(&pair, a + r * lda + d, 4);
      const __m256i raw = _mm256_set1_epi32(pair);
      const __m256 a_even = even_half(raw), a_odd = odd_half(raw);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++)
        sum[r][v] = _mm256_fmadd_ps(a_odd, odd[v], _mm256_fmadd_ps(a_even, even[v], sum[r][v]));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) _mm256_storeu_ps(c + r * ldc + 8 * v, sum[r][v]);
}

template <int Rows>
void tiles(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* group, int rows, int depth, bool accumulate) {
  for (; rows >= Rows; rows -= Rows, c += Rows * ldc, a += Rows * lda)
    tile<Rows>(c, ldc, a, lda, group, depth, accumulate);
  if constexpr (Rows > 1)
    if (rows > 0) tiles<Rows - 1>(c, ldc, a, lda, group, rows, depth, accumulate);
}

// Depth in steps: sixteen columns of a panel step stay in L1 while all rows meet them.
constexpr int kDepthStep = 512;

void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int width,
              int rows, int depth, bool accumulate) {
  for (int d = 0; d < depth; d += kDepthStep)
    for (int j = 0; j < width; j += kColumns)
      tiles<4>(c + j, ldc, a + d, lda, panel + j * panel_depth + d * kColumns, rows,
               depth - d < kDepthStep ? depth - d : kDepthStep, accumulate || d > 0);
}

int64_t burn(int64_t iterations) {
  constexpr int kSums = 12;
  __m256 sum[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; i++) sum[i] = _mm256_set1_ps(float(i));
  const __m256 half = _mm256_set1_ps(0.5f);
  for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) {
      sum[i] = _mm256_fmadd_ps(sum[i], half, half);
      __asm__ volatile("" : "+x"(sum[i]));
    }
  }
  return iterations * kSums * 16;
}

}  // namespace

const Kernels& kernels_avx2() {
  static const Kernels table = {
      .isa = "avx2", .panel_width = 32, .row_unit = 1, .depth_unit = kDepthUnit,
      .pack_rows = pack_rows, .pack_pairs = pack_pairs, .multiply = multiply,
      .unpermute = unpermute, .activate = activate, .interleave = interleave,
      .store_rows_bf16 = store_rows_bf16, .store_rows_f32 = store_rows_f32, .round = round_to_bf16, .widen = widen,
      .gate_backward = gate_backward, .rank_grad_bf16 = rank_grad<bf16>, .rank_grad_f32 = rank_grad<float>,
      .combine = combine, .keep_mask = keep_mask, .decode = decode<Avx2Runs>, .burn = burn,
  };
  return table;
}

}  // namespace ktlib
