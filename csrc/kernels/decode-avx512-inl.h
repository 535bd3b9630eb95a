// Decoding with AVX-512. Included after kernels/avx512-inl.h and kernels/decode-inl.h.

// Thirty-two fp32 as bf16, in order. VCVTNE2PS2BF16 makes zeros of subnormal numbers and keeps the sign of a NaN; so it is
// for `ordinary` scales alone, see load_scales.
template <bool ordinary>
inline __m512i round32(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  if constexpr (ordinary) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(round_dwords_by_integers(low))),
                            _mm512_cvtepi32_epi16(round_dwords_by_integers(high)), 1);
}

inline __m512 scales16(const Codes& row, int64_t first, __mmask16 valid) {
  const char* scales = static_cast<const char*>(row.scales);
  switch (row.scale_type) {
    case ScaleType::fp32:
      return _mm512_maskz_loadu_ps(valid, scales + 4 * first);
    case ScaleType::bf16:
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, scales + 2 * first)), 16));
    case ScaleType::fp16:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, scales + 2 * first));
    default: {
      const __m512i exponent = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, scales + first));
      __m512i bits = _mm512_slli_epi32(exponent, 23);
      bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(exponent, exponent), _mm512_set1_epi32(0x00400000));
      const __mmask16 nan = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(255));
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
    }
  }
}

// The scales of the groups [first, first + count) as fp32, `count` rounded up to 16 of them. Returns whether all are
// ordinary: no product with a value of a code, which is 0 or at least 2^-9 in magnitude, is subnormal, or NaN but for a code
// that is NaN.
inline bool load_scales(float* scales, const Codes& row, int64_t first, int count) {
  bool ordinary = true;
  for (int i = 0; i < count; i += 16) {
    const __mmask16 valid = first16(count - i);
    const __m512 values = scales16(row, first + i, valid), magnitude = _mm512_abs_ps(values);
    _mm512_store_ps(scales + i, values);
    const __mmask16 in_range = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p100f), _CMP_LT_OQ);
    ordinary = ordinary && (in_range & valid) == valid;
  }
  return ordinary;
}

// Runs of codes that share a scale, as ScalarRuns.
template <bool ordinary>
struct Avx512Runs {
  static __m256i load32(const uint8_t* codes, int64_t count) {
    return count >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                       : _mm256_maskz_loadu_epi8(first32(int(count)), codes);
  }
  static void store32(bf16* dst, __m512i weights, int64_t count) {
    if (count >= 32)
      _mm512_storeu_si512(dst, weights);
    else
      _mm512_mask_storeu_epi16(dst, first32(int(count)), weights);
  }

  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    // As fp16, whose exponent has one bit more, a code is 2^8 too small.
    const __m512 s = _mm512_set1_ps(scale), bias = _mm512_set1_ps(0x1p8f);
    for (int64_t i = 0; i < count; i += 32) {
      const __m512i words = _mm512_cvtepu8_epi16(load32(codes + i, count - i));
      const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
      const __m512i half = _mm512_or_si512(_mm512_slli_epi16(magnitude, 7),
                                           _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8));
      const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), bias);
      const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), bias);
      const __m512i weights = round32<ordinary>(_mm512_mul_ps(low, s), _mm512_mul_ps(high, s));
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
      store32(dst + i, _mm512_mask_mov_epi16(weights, nan, _mm512_set1_epi16(0x7fc0)), count - i);
    }
  }

  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    const __m512 s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero);
    for (int64_t i = 0; i < count; i += 32) {
      const __m256i bytes = load32(codes + i, count - i);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      store32(dst + i,
              round32<ordinary>(_mm512_mul_ps(s, _mm512_sub_ps(low, z)), _mm512_mul_ps(s, _mm512_sub_ps(high, z))),
              count - i);
    }
  }

  static void four_bits(bf16* dst, const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale,
                        float zero) {
    if (first % 2) {
      ScalarRuns::four_bits(dst++, codes, first++, 1, codebook, scale, zero);
      if (--count == 0) return;
    }
    // The sixteen weights that a code may stand for, twice: then the fifth bit of an index does not matter.
    const __m512 products =
        _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(zero)));
    const __m512i weights = round32<ordinary>(products, products);
    for (int64_t i = 0; i < count; i += 32) {
      const uint8_t* bytes = codes + (first + i) / 2;
      const __m512i byte = _mm512_cvtepu8_epi32(
          count - i >= 31 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))
                          : _mm_maskz_loadu_epi8(first16(int(count - i + 1) / 2), bytes));
      // Each half of a dword begins with one of the two codes.
      const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
      store32(dst + i, _mm512_permutexvar_epi16(index, weights), count - i);
    }
  }
};

// Pairs of groups of 32 columns of 4-bit codes without zeros: both groups' weights are made at once, in one register.
inline void decode_pairs_of_32(bf16* dst, const uint8_t* codes, const float* scales, int64_t pairs, const float* codebook) {
  const __m512 values = _mm512_loadu_ps(codebook);
  const __m512i nibbles = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
  const auto indices = [&](const uint8_t* bytes) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return _mm512_ternarylogic_epi32(byte, _mm512_slli_epi32(byte, 12), nibbles, 0xa8);  // (a | b) & c
  };
  for (int64_t i = 0; i < pairs; i++) {
    const __m512i weights = round32<true>(_mm512_mul_ps(values, _mm512_set1_ps(scales[2 * i])),
                                          _mm512_mul_ps(values, _mm512_set1_ps(scales[2 * i + 1])));
    _mm512_storeu_si512(dst + 64 * i, _mm512_permutexvar_epi16(indices(codes + 32 * i), weights));
    _mm512_storeu_si512(dst + 64 * i + 32,
                        _mm512_permutexvar_epi16(_mm512_or_si512(indices(codes + 32 * i + 16), second), weights));
  }
}

// Columns [first, end) of a row, whose scales are given from that of `group` on, which has the first column.
template <bool ordinary>
inline void decode_groups(bf16* dst, const Codes& row, const float* scales, int64_t group, int64_t first, int64_t end) {
  if (ordinary && row.group == 32 && has_4_bits(row.format) && !row.zeros && first % 32 == 0) {
    const int64_t pairs = (end - first) / 64;
    decode_pairs_of_32(dst, row.codes + first / 2, scales, pairs, codebook(row.format));
    dst += 64 * pairs;
    first += 64 * pairs;
    group += 2 * pairs;
    scales += 2 * pairs;
  }
  for (int64_t i = first, stop; i < end; dst += stop - i, i = stop, group++, scales++) {
    stop = (group + 1) * row.group < end ? (group + 1) * row.group : end;
    decode_run<Avx512Runs<ordinary>>(dst, row, i, stop - i, *scales, row.zeros ? float(row.zeros[group]) : 0.0f);
  }
}

inline void decode_avx512(bf16* dst, int64_t ldd, const Codes& codes, int rows, int64_t first, int64_t count) {
  constexpr int kGroups = 64;
  alignas(64) float scales[kGroups];
  const int64_t end = first + count, first_group = first / codes.group;
  bool ordinary = true;
  Codes row = codes;
  for (int r = 0; r < rows; r++, dst += ldd, row.next_row()) {
    fetch_ahead(row, first, count);
    int64_t group = first_group;
    for (int64_t i = first, stop; i < end; i = stop, group += kGroups) {
      stop = (group + kGroups) * row.group < end ? (group + kGroups) * row.group : end;
      // A row of the same group of rows has the scales that are there.
      if (r == 0 || row.group_row == 0 || stop < end || i > first) {
        int groups = 1;
        while (groups < kGroups && (group + groups) * row.group < stop) groups++;
        ordinary = load_scales(scales, row, group, groups);
      }
      if (ordinary)
        decode_groups<true>(dst + i - first, row, scales, group, i, stop);
      else
        decode_groups<false>(dst + i - first, row, scales, group, i, stop);
    }
  }
}
