// Decoding with AVX-512. Included after kernels/avx512-inl.h and kernels/decode-inl.h.

// Whether no product of a code's value (at least 2^-9 in magnitude, or 0) and this scale is a subnormal number, and none is
// NaN but for a code that is NaN. VCVTNE2PS2BF16 makes zeros of subnormal numbers, and keeps the sign of a NaN.
inline bool is_ordinary(float scale) {
  const float magnitude = scale < 0 ? -scale : scale;
  return magnitude >= 0x1p-100f && magnitude < 0x1p100f;
}

// Thirty-two fp32 as bf16, in order.
template <bool ordinary>
inline __m512i round32(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  if constexpr (ordinary) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(round_dwords_by_integers(low))),
                            _mm512_cvtepi32_epi16(round_dwords_by_integers(high)), 1);
}

struct Avx512Runs {
  template <bool ordinary>
  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    // As fp16, whose exponent has one bit more, a code is 2^8 too small.
    const __m512 s = _mm512_set1_ps(scale), bias = _mm512_set1_ps(0x1p8f);
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 valid = count - i < 32 ? first32(int(count - i)) : ~__mmask32(0);
      const __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(valid, codes + i));
      const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
      const __m512i half = _mm512_or_si512(_mm512_slli_epi16(magnitude, 7),
                                           _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8));
      const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), bias);
      const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), bias);
      const __m512i weights = round32<ordinary>(_mm512_mul_ps(low, s), _mm512_mul_ps(high, s));
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
      _mm512_mask_storeu_epi16(dst + i, valid, _mm512_mask_mov_epi16(weights, nan, _mm512_set1_epi16(0x7fc0)));
    }
  }
  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    is_ordinary(scale) ? e4m3<true>(dst, codes, count, scale) : e4m3<false>(dst, codes, count, scale);
  }

  template <bool ordinary>
  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    const __m512 s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero);
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 valid = count - i < 32 ? first32(int(count - i)) : ~__mmask32(0);
      const __m256i bytes = _mm256_maskz_loadu_epi8(valid, codes + i);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      _mm512_mask_storeu_epi16(
          dst + i, valid,
          round32<ordinary>(_mm512_mul_ps(s, _mm512_sub_ps(low, z)), _mm512_mul_ps(s, _mm512_sub_ps(high, z))));
    }
  }
  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    is_ordinary(scale) ? int8<true>(dst, codes, count, scale, zero) : int8<false>(dst, codes, count, scale, zero);
  }

  // The sixteen weights that a code may stand for, twice: then the fifth bit of an index does not matter.
  static __m512i table(const float* codebook, float scale, float zero) {
    const __m512 products =
        _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(zero)));
#ifdef __AVX512BF16__
    if (is_ordinary(scale)) return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(products));
#endif
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(round_dwords_by_integers(products)));
  }
  static void four_bits(bf16* dst, const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale,
                        float zero) {
    if (first % 2) {
      ScalarRuns::four_bits(dst++, codes, first++, 1, codebook, scale, zero);
      if (--count == 0) return;
    }
    const __m512i weights = table(codebook, scale, zero);
    codes += first / 2;
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 valid = count - i < 32 ? first32(int(count - i)) : ~__mmask32(0);
      const __mmask16 bytes = count - i < 32 ? first16(int(count - i + 1) / 2) : __mmask16(0xffff);
      // A byte in a dword, and once more from its bit 12 on: each half of the dword begins with one of the two codes.
      const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, codes + i / 2));
      const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
      _mm512_mask_storeu_epi16(dst + i, valid, _mm512_permutexvar_epi16(index, weights));
    }
  }
};
