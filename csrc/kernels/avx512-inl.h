// AVX-512 (F, BW, VL, DQ): packers, transposing stores and the micro-kernel. Included like kernels/common-inl.h, after the
// file's kDepthUnit. Compiled with -mavx512bf16 the product of a bf16 pair is one VDPBF16PS; without, two FMAs on the
// halves widened to fp32.

inline __mmask16 first16(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n > 0 ? n : 0)) - 1); }
inline __mmask32 first32(int n) { return n >= 32 ? __mmask32(0xffffffffu) : __mmask32((1u << (n > 0 ? n : 0)) - 1); }

// Sixteen fp32 -> bf16 in the low halves of sixteen dwords.
inline __m512i round_dwords_by_integers(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

inline __m512i round_dwords(__m512 x) {
#ifdef __AVX512BF16__
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
#else
  return round_dwords_by_integers(x);
#endif
}

// Sixteen pairs: low half from `even`, high half from `odd`.
inline __m512i round_pairs(__m512 even, __m512 odd) {
  return _mm512_or_si512(round_dwords(even), _mm512_slli_epi32(round_dwords(odd), 16));
}

// In-place transpose of a 16 x 16 block of dwords.
inline void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

void pack_rows(bf16* panel, int width, const bf16* src, int64_t ld, const int32_t* rows, int count, int depth) {
  const int64_t padded = round_up(depth, kDepthUnit);
  for (int i = 0; i < width; i += 16) {
    const bf16* row[16];
    for (int k = 0; k < 16; k++) row[k] = i + k < count ? src + (rows ? rows[i + k] : i + k) * ld : nullptr;
    for (int d = 0; d < padded; d += 32) {
      const __mmask32 valid = first32(depth - d);
      __m512i block[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
        block[k] = row[k] ? _mm512_maskz_loadu_epi16(valid, row[k] + d) : _mm512_setzero_si512();
      transpose16(block);
      const int pairs = int(padded - d) / 2;
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
        if (k < pairs) _mm512_storeu_si512(panel + i * padded + (d + 2 * k) * kColumns, block[k]);
    }
  }
}

// Two rows of `columns` elements; columns beyond are zero, and so is a row that is null. whole: neither occurs. Without
// masks and tests more loads are under way at a time, and weights come from memory a quarter faster.
template <bool whole>
inline void pack_pair(bf16* panel, int64_t panel_depth, int width, const bf16* even, const bf16* odd, int columns) {
#pragma GCC unroll 2
  for (int j = 0; j < width; j += 32) {
    bf16* group = panel + j * panel_depth;
    const __mmask32 valid = first32(columns - j);
    auto load = [&](const bf16* row) {
      if constexpr (whole) return _mm512_loadu_si512(row + j);
      return row ? _mm512_maskz_loadu_epi16(valid, row + j) : _mm512_setzero_si512();
    };
    const __m512i a = load(even), b = load(odd);
    const __m512i lo = _mm512_unpacklo_epi16(a, b), hi = _mm512_unpackhi_epi16(a, b);
    if (whole || j + 32 <= width) {  // column order within the group: see unpermute
      _mm512_storeu_si512(group, lo);
      _mm512_storeu_si512(group + kColumns * panel_depth, hi);
    } else {  // the last sixteen columns keep their order
      const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      _mm512_storeu_si512(group, _mm512_permutex2var_epi64(lo, order, hi));
    }
  }
}

void pack_pairs(bf16* panel, int64_t panel_depth, int width, const bf16* src, int64_t ld, const int32_t* rows, int depth,
                int columns) {
  const int padded = int(round_up(depth, kDepthUnit));
  const auto row = [&](int d) { return d < depth ? src + (rows ? rows[d] : d) * ld : nullptr; };
  int d = 0;
  if (width == kMaxWidth && columns >= kMaxWidth)
    for (; d + 1 < depth; d += 2)
      pack_pair<true>(panel + d * kColumns, panel_depth, kMaxWidth, row(d), row(d + 1), kMaxWidth);
  for (; d < padded; d += 2) pack_pair<false>(panel + d * kColumns, panel_depth, width, row(d), row(d + 1), columns);
}

// unpacklo / unpackhi leave the eight quads of 32 columns as 0 2 4 6 | 1 3 5 7.
void unpermute(float* c, int64_t ldc, int rows, int width) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j + 32 <= width; j += 32) {
      float* group = c + r * ldc + j;
      const __m512 lo = _mm512_loadu_ps(group), hi = _mm512_loadu_ps(group + 16);
      _mm512_storeu_ps(group, _mm512_permutex2var_ps(lo, first, hi));
      _mm512_storeu_ps(group + 16, _mm512_permutex2var_ps(lo, second, hi));
    }
}

void interleave(bf16* panel, int64_t panel_depth, int width, const float* c, int64_t ldc, int features) {
  for (int f = 0; f < features; f += 2)
    for (int i = 0; i < width; i += 16) {
      const __m512 even = _mm512_loadu_ps(c + f * ldc + i);
      const __m512 odd = f + 1 < features ? _mm512_loadu_ps(c + (f + 1) * ldc + i) : _mm512_setzero_ps();
      _mm512_storeu_si512(panel + i * panel_depth + f * kColumns, round_pairs(even, odd));
    }
}

// Whole lines go past the caches: what is saved for backward is not read again before all of the layer has passed.
void store_rows_bf16(bf16* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  const bool lines = reinterpret_cast<uintptr_t>(dst) % 64 == 0 && ld % 32 == 0;
  for (int f = 0; f < features; f += 32)
    for (int i = 0; i < tokens; i += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) {
        const int even = f + 2 * k;
        block[k] = round_pairs(even < features ? _mm512_loadu_ps(c + even * ldc + i) : _mm512_setzero_ps(),
                               even + 1 < features ? _mm512_loadu_ps(c + (even + 1) * ldc + i) : _mm512_setzero_ps());
      }
      transpose16(block);
      const __mmask32 valid = first32(features - f);
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
        if (i + k < tokens) {
          bf16* row = dst + (i + k) * ld + f;
          if (lines && f + 32 <= features)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(row), block[k]);
          else
            _mm512_mask_storeu_epi16(row, valid, block[k]);
        }
    }
  if (lines) _mm_sfence();  // streaming stores are not ordered with those that tell other threads of them
}

void store_rows_f32(float* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  for (int f = 0; f < features; f += 16)
    for (int i = 0; i < tokens; i += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
        block[k] = f + k < features ? _mm512_loadu_si512(c + (f + k) * ldc + i) : _mm512_setzero_si512();
      transpose16(block);
      const __mmask16 valid = first16(features - f);
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
        if (i + k < tokens) _mm512_mask_storeu_epi32(dst + (i + k) * ld + f, valid, block[k]);
    }
}

// kTileRows[v]: rows of a tile of v vectors, as many as leave registers for the operands.
#ifdef __AVX512BF16__
constexpr int kTileRows[] = {0, 16, 12, 8, 6};
using Pairs = __m512i;
inline Pairs load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
inline Pairs broadcast_pair(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}
inline __m512 dot(__m512 sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr int kTileRows[] = {0, 16, 12, 7, 5};
struct Pairs {
  __m512 even, odd;
};
inline Pairs halves(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))))};
}
inline Pairs load_pairs(const bf16* p) { return halves(_mm512_loadu_si512(p)); }
inline Pairs broadcast_pair(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return halves(_mm512_set1_epi32(pair));
}
inline __m512 dot(__m512 sum, Pairs a, Pairs b) {
  return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, sum));
}
#endif

// Rows x 16 * Vectors accumulators live in registers for the whole depth.
template <int Rows, int Vectors>
inline void tile(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int depth,
                 bool accumulate) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
      sum[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
  for (int d = 0; d < depth; d += 2) {
    Pairs b[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) b[v] = load_pairs(panel + (v * panel_depth + d) * kColumns);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      const Pairs pair = broadcast_pair(a + r * lda + d);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) sum[r][v] = dot(sum[r][v], pair, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) _mm512_storeu_ps(c + r * ldc + 16 * v, sum[r][v]);
}

// Full tiles first, then one tile of exactly the rows that are left (a loop over single rows costs 13 %).
template <int Rows, int Vectors>
void tiles(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int rows, int depth,
           bool accumulate) {
  for (; rows >= Rows; rows -= Rows, c += Rows * ldc, a += Rows * lda)
    tile<Rows, Vectors>(c, ldc, a, lda, panel, panel_depth, depth, accumulate);
  if constexpr (Rows > 1)
    if (rows > 0) tiles<Rows - 1, Vectors>(c, ldc, a, lda, panel, panel_depth, rows, depth, accumulate);
}

void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int width,
              int rows, int depth, bool accumulate) {
  switch (width / 16) {
    case 4: return tiles<kTileRows[4], 4>(c, ldc, a, lda, panel, panel_depth, rows, depth, accumulate);
    case 3: return tiles<kTileRows[3], 3>(c, ldc, a, lda, panel, panel_depth, rows, depth, accumulate);
    case 2: return tiles<kTileRows[2], 2>(c, ldc, a, lda, panel, panel_depth, rows, depth, accumulate);
    case 1: return tiles<kTileRows[1], 1>(c, ldc, a, lda, panel, panel_depth, rows, depth, accumulate);
  }
}

int64_t burn(int64_t iterations) {
  constexpr int kSums = 24;
  __m512 sum[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; i++) sum[i] = _mm512_set1_ps(float(i));
#ifdef __AVX512BF16__
  const __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#else
  const __m512 half = _mm512_set1_ps(0.5f);
#endif
  for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; i++) {
#ifdef __AVX512BF16__
      sum[i] = _mm512_dpbf16_ps(sum[i], one, one);
#else
      sum[i] = _mm512_fmadd_ps(sum[i], half, half);
#endif
      __asm__ volatile("" : "+v"(sum[i]));
    }
  }
#ifdef __AVX512BF16__
  return iterations * kSums * 64;
#else
  return iterations * kSums * 32;
#endif
}
