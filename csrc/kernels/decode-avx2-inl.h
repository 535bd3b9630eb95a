// Decoding with AVX2. Included after kernels/decode-inl.h.

// Eight fp32 -> bf16 in the low halves of eight dwords.
inline __m256i round_dwords(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb), 16);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

// Sixteen fp32 as bf16, in order.
inline __m256i round16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_dwords(low), round_dwords(high)), 0xd8);
}

inline __m256 e4m3_to_floats(__m128i bytes) {
  const __m256i code = _mm256_cvtepu8_epi32(bytes), magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  // As e4m3_to_float.
  const __m256 normal = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  const __m256 less = _mm256_sub_ps(normal, _mm256_set1_ps(0x1p-7f));
  const __m256 value = _mm256_blendv_ps(normal, _mm256_add_ps(less, less),
                                        _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude)));
  return _mm256_blendv_ps(_mm256_or_ps(value, _mm256_castsi256_ps(sign)), _mm256_set1_ps(__builtin_nanf("")),
                          _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f))));
}

struct Avx2Runs {
  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                          round16(_mm256_mul_ps(s, e4m3_to_floats(bytes)),
                                  _mm256_mul_ps(s, e4m3_to_floats(_mm_unpackhi_epi64(bytes, bytes)))));
    }
    ScalarRuns::e4m3(dst + i, codes + i, count - i, scale);
  }

  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
    const auto products = [&](__m128i bytes) {
      return _mm256_mul_ps(s, _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), z));
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                          round16(products(bytes), products(_mm_unpackhi_epi64(bytes, bytes))));
    }
    ScalarRuns::int8(dst + i, codes + i, count - i, scale, zero);
  }

  static void four_bits(bf16* dst, const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale,
                        float zero) {
    int64_t i = first % 2 ? 1 : 0;
    if (i) ScalarRuns::four_bits(dst, codes, first, 1, codebook, scale, zero);
    // The sixteen weights that a code may stand for: their low bytes, their high bytes.
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
    const __m256i weights = round16(_mm256_mul_ps(s, _mm256_sub_ps(_mm256_loadu_ps(codebook), z)),
                                    _mm256_mul_ps(s, _mm256_sub_ps(_mm256_loadu_ps(codebook + 8), z)));
    const __m128i first8 = _mm256_castsi256_si128(weights), last8 = _mm256_extracti128_si256(weights, 1);
    const __m128i byte = _mm_set1_epi16(0xff), code = _mm_set1_epi8(15);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first8, byte), _mm_and_si128(last8, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first8, 8), _mm_srli_epi16(last8, 8));
    for (; i + 32 <= count; i += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (first + i) / 2));
      const __m128i even = _mm_and_si128(bytes, code), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), code);
      const __m128i even_low = _mm_shuffle_epi8(low, even), even_high = _mm_shuffle_epi8(high, even);
      const __m128i odd_low = _mm_shuffle_epi8(low, odd), odd_high = _mm_shuffle_epi8(high, odd);
      const __m128i even0 = _mm_unpacklo_epi8(even_low, even_high), even1 = _mm_unpackhi_epi8(even_low, even_high);
      const __m128i odd0 = _mm_unpacklo_epi8(odd_low, odd_high), odd1 = _mm_unpackhi_epi8(odd_low, odd_high);
      __m128i* out = reinterpret_cast<__m128i*>(dst + i);
      _mm_storeu_si128(out, _mm_unpacklo_epi16(even0, odd0));
      _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(even0, odd0));
      _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(even1, odd1));
      _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(even1, odd1));
    }
    if (i < count) ScalarRuns::four_bits(dst + i, codes, first + i, count - i, codebook, scale, zero);
  }
};
