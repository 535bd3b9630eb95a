// Decoding with AVX2. Included after kernels/decode-inl.h.

// Eight fp32 -> bf16 in the low halves of eight dwords. nan: there may be some that are NaN.
template <bool nan>
inline __m256i round_dwords(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb), 16);
  if constexpr (!nan) return rounded;
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

// Sixteen fp32 as bf16, in order.
template <bool nan>
inline __m256i round16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_dwords<nan>(low), round_dwords<nan>(high)), 0xd8);
}

// Then no product of a scale with a value of int8 or 4 bits is NaN.
inline bool is_finite(float scale) { return __builtin_fabsf(scale) < __builtin_inff(); }

// The weights of sixteen values, their low bytes and their high bytes: tables for PSHUFB.
struct ByteTables {
  __m128i low, high;
  ByteTables(const float* values, float scale, float zero) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
    const __m256 a = _mm256_mul_ps(s, _mm256_sub_ps(_mm256_loadu_ps(values), z));
    const __m256 b = _mm256_mul_ps(s, _mm256_sub_ps(_mm256_loadu_ps(values + 8), z));
    const __m256i weights = is_finite(scale) ? round16<false>(a, b) : round16<true>(a, b);
    const __m128i first8 = _mm256_castsi256_si128(weights), last8 = _mm256_extracti128_si256(weights, 1);
    const __m128i byte = _mm_set1_epi16(0xff);
    low = _mm_packus_epi16(_mm_and_si128(first8, byte), _mm_and_si128(last8, byte));
    high = _mm_packus_epi16(_mm_srli_epi16(first8, 8), _mm_srli_epi16(last8, 8));
  }
};

struct Avx2Runs {
  // A weight is that of a code with the smallest exponent, its exponent raised by the difference: rounding does not depend on
  // the exponent where no product is subnormal or infinite.
  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    int64_t i = 0;
    if (__builtin_fabsf(scale) >= 0x1p-100f && __builtin_fabsf(scale) < 0x1p100f) {
      const ByteTables weights(kE4m3Values, scale, 0.0f);
      const __m256i low = _mm256_broadcastsi128_si256(weights.low), high = _mm256_broadcastsi128_si256(weights.high);
      for (; i + 32 <= count; i += 32) {
        // Unpacking takes the first half of each lane, then the second.
        const __m256i code = _mm256_permute4x64_epi64(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)), 0xd8);
        const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi8(0x7f)), sign = _mm256_xor_si256(code, magnitude);
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f)))) {
          ScalarRuns::e4m3(dst + i, codes + i, 32, scale);  // some are NaN
          continue;
        }
        const __m256i index = _mm256_min_epu8(
            magnitude, _mm256_or_si256(_mm256_and_si256(code, _mm256_set1_epi8(7)), _mm256_set1_epi8(8)));
        const __m256i exponent = _mm256_sub_epi8(magnitude, index), zero = _mm256_setzero_si256();
        const __m256i low_bytes = _mm256_shuffle_epi8(low, index);
        const __m256i high_bytes = _mm256_xor_si256(_mm256_shuffle_epi8(high, index), sign);
        __m256i* out = reinterpret_cast<__m256i*>(dst + i);
        _mm256_storeu_si256(out, _mm256_add_epi16(_mm256_unpacklo_epi8(low_bytes, high_bytes),
                                                  _mm256_slli_epi16(_mm256_unpacklo_epi8(exponent, zero), 4)));
        _mm256_storeu_si256(out + 1, _mm256_add_epi16(_mm256_unpackhi_epi8(low_bytes, high_bytes),
                                                      _mm256_slli_epi16(_mm256_unpackhi_epi8(exponent, zero), 4)));
      }
    }
    ScalarRuns::e4m3(dst + i, codes + i, count - i, scale);
  }

  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    if (is_finite(scale))
      int8_products<false>(dst, codes, count, scale, zero);
    else
      int8_products<true>(dst, codes, count, scale, zero);
  }

  template <bool nan>
  static void int8_products(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
    const auto products = [&](const uint8_t* eight) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight));
      return _mm256_mul_ps(s, _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), z));
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), round16<nan>(products(codes + i), products(codes + i + 8)));
    ScalarRuns::int8(dst + i, codes + i, count - i, scale, zero);
  }

  static void four_bits(bf16* dst, const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale,
                        float zero) {
    int64_t i = first % 2 ? 1 : 0;
    if (i) ScalarRuns::four_bits(dst, codes, first, 1, codebook, scale, zero);
    const ByteTables weights(codebook, scale, zero);
    const __m128i low = weights.low, high = weights.high, code = _mm_set1_epi8(15);
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
