// Decoding with AVX-512. Included after kernels/avx512-inl.h and kernels/decode-inl.h.

// Thirty-two fp32 as bf16, in order. VCVTNE2PS2BF16 makes zeros of subnormal numbers and keeps the sign of a NaN; so it is
// for `ordinary` scales alone, see load_scales.
template <bool ordinary>
inline __m512i round32(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  if constexpr (ordinary) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#endif
  if constexpr (ordinary) {  // no NaN
    const auto rounded = [](__m512 x) {
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
    };
    const __m512i odd_words = _mm512_setr_epi32(0x030001, 0x070005, 0x0b0009, 0x0f000d, 0x130011, 0x170015, 0x1b0019,
                                                0x1f001d, 0x230021, 0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035,
                                                0x3b0039, 0x3f003d);
    return _mm512_permutex2var_epi16(rounded(low), odd_words, rounded(high));
  }
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

// Sixteen bytes, or the first `left` of them.
template <bool whole>
inline __m128i load16(const uint8_t* bytes, int64_t left) {
  if constexpr (whole) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm_maskz_loadu_epi8(first16(int(left)), bytes);
}

// What is the same for a run of codes that share a scale and a zero. weights: those of 32 codes, or of the first `left` of
// them unless all 32 are there (whole). kBytes: of 32 codes.
struct E4m3Run {
  static constexpr int kBytes = 32;
  const __m512 scale;
  E4m3Run(const Codes&, float scale, float) : scale(_mm512_set1_ps(scale)) {}

  template <bool whole>
  static __m512i words(const uint8_t* codes, int64_t left) {
    return _mm512_cvtepu8_epi16(whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                                      : _mm256_maskz_loadu_epi8(first32(int(left)), codes));
  }

  // As fp16, whose exponent has one bit more, a code is 2^8 too small.
  template <bool whole>
  __m512i weights(const uint8_t* codes, int64_t left) const {
    const __m512i code = words<whole>(codes, left), magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    const __m512i half = _mm512_or_si512(_mm512_slli_epi16(magnitude, 7),
                                         _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8));
    const auto product = [&](__m256i halves) {
      return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(0x1p8f)), scale);
    };
    const __m512i rounded =
        round32<false>(product(_mm512_castsi512_si256(half)), product(_mm512_extracti64x4_epi64(half, 1)));
    return _mm512_mask_mov_epi16(rounded, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                 _mm512_set1_epi16(0x7fc0));
  }
};

// With an ordinary scale a weight is that of a code with the smallest exponent, its exponent raised by the difference:
// rounding does not depend on the exponent.
struct OrdinaryE4m3Run {
  static constexpr int kBytes = 32;
  __m512i table;  // of kE4m3Values, twice: then the fifth bit of an index does not matter
  OrdinaryE4m3Run(const Codes&, float scale, float) {
    const __m512 products = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(kE4m3Values));
    table = round32<true>(products, products);
  }

  template <bool whole>
  __m512i weights(const uint8_t* codes, int64_t left) const {
    const __m512i code = E4m3Run::words<whole>(codes, left), magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    const __m512i fraction = _mm512_ternarylogic_epi32(code, _mm512_set1_epi16(7), _mm512_set1_epi16(8), 0xea);  // (a & b) | c
    const __m512i index = _mm512_min_epu16(magnitude, fraction);
    const __m512i weight = _mm512_ternarylogic_epi32(_mm512_permutexvar_epi16(index, table), _mm512_slli_epi16(code, 8),
                                                     _mm512_set1_epi16(-0x8000), 0x78);  // a ^ (b & c)
    const __mmask32 number = _mm512_cmpneq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    return _mm512_mask_add_epi16(_mm512_set1_epi16(0x7fc0), number, weight,
                                 _mm512_slli_epi16(_mm512_sub_epi16(magnitude, index), 4));
  }
};

template <bool ordinary, bool zeros>
struct Int8Run {
  static constexpr int kBytes = 32;
  const __m512 scale, zero;
  Int8Run(const Codes&, float scale, float zero) : scale(_mm512_set1_ps(scale)), zero(_mm512_set1_ps(zero)) {}

  template <bool whole>
  __m512i weights(const uint8_t* codes, int64_t left) const {
    const auto product = [&](int64_t j) {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16<whole>(codes + j, left - j)));
      return _mm512_mul_ps(scale, zeros ? _mm512_sub_ps(value, zero) : value);
    };
    return round32<ordinary>(product(0), product(16));
  }
};

template <bool ordinary, bool zeros>
struct FourBitRun {
  static constexpr int kBytes = 16;
  __m512i table;  // the sixteen weights that a code may stand for, twice: then the fifth bit of an index does not matter
  FourBitRun(const Codes& row, float scale, float zero) {
    const __m512 values = _mm512_loadu_ps(codebook(row.format));
    const __m512 products =
        _mm512_mul_ps(_mm512_set1_ps(scale), zeros ? _mm512_sub_ps(values, _mm512_set1_ps(zero)) : values);
    table = round32<ordinary>(products, products);
  }

  // Each half of a dword begins with one of the two codes of a byte.
  template <bool whole>
  __m512i weights(const uint8_t* codes, int64_t left) const {
    const __m512i byte = _mm512_cvtepu8_epi32(load16<whole>(codes, (left + 1) / 2));
    return _mm512_permutexvar_epi16(_mm512_or_si512(byte, _mm512_slli_epi32(byte, 12)), table);
  }
};

// ahead: of Codes. A line is fetched for each that is decoded, for the reason that is given at fetch_ahead.
template <class Run>
inline void decode_run(bf16* dst, const Run& run, const uint8_t* codes, int64_t count, int64_t ahead) {
  for (; count >= 64; count -= 64, dst += 64, codes += 2 * Run::kBytes) {
    __builtin_prefetch(codes + ahead, 0, 2);
    const __m512i low = run.template weights<true>(codes, 32), high = run.template weights<true>(codes + Run::kBytes, 32);
    _mm512_storeu_si512(dst, low);
    _mm512_storeu_si512(dst + 32, high);
  }
  for (; count > 0; count -= 32, dst += 32, codes += Run::kBytes)
    _mm512_mask_storeu_epi16(dst, first32(int(count)), run.template weights<false>(codes, count));
}

// Columns [first, end) of a row, whose scales are given from that of `group` on, which has the first column.
template <class Run>
inline void decode_groups(bf16* dst, const Codes& row, const float* scales, int64_t group, int64_t first, int64_t end) {
  const int8_t* zeros = row.zeros ? row.zeros + group : nullptr;
  for (int64_t i = first, stop = (group + 1) * row.group; i < end; i = stop, stop += row.group, scales++) {
    if (stop > end) stop = end;
    const float zero = zeros ? float(*zeros++) : 0.0f;
    if (Run::kBytes == 16 && i % 2)  // the second code of a byte
      ScalarRuns::four_bits(dst++, row.codes, i++, 1, codebook(row.format), *scales, zero);
    decode_run(dst, Run(row, *scales, zero), row.codes + i * Run::kBytes / 32, stop - i, row.ahead);
    dst += stop - i;
  }
}

// Pairs of groups of 32 columns of 4-bit codes without zeros: both groups' weights are made at once, in one register.
inline void decode_pairs_of_32(bf16* dst, const uint8_t* codes, int64_t ahead, const float* scales, int64_t pairs,
                               const float* codebook) {
  const __m512 values = _mm512_loadu_ps(codebook);
  const __m512i nibbles = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
#pragma GCC unroll 2
  for (int64_t i = 0; i < pairs; i++) {
    __builtin_prefetch(codes + 32 * i + ahead, 0, 2);
    const __m512i weights = round32<true>(_mm512_mul_ps(values, _mm512_set1_ps(scales[2 * i])),
                                          _mm512_mul_ps(values, _mm512_set1_ps(scales[2 * i + 1])));
    const __m512i low = _mm512_cvtepu8_epi32(load16<true>(codes + 32 * i, 16));
    const __m512i high = _mm512_cvtepu8_epi32(load16<true>(codes + 32 * i + 16, 16));
    // (a | b) & c, a | b | c: of an index of 32 only the last five bits matter.
    const __m512i of_first = _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(low, 12), nibbles, 0xa8);
    const __m512i of_second = _mm512_ternarylogic_epi32(high, _mm512_slli_epi32(high, 12), second, 0xfe);
    _mm512_storeu_si512(dst + 64 * i, _mm512_permutexvar_epi16(of_first, weights));
    _mm512_storeu_si512(dst + 64 * i + 32, _mm512_permutexvar_epi16(of_second, weights));
  }
}

template <bool ordinary>
inline void decode_row(bf16* dst, const Codes& row, const float* scales, int64_t group, int64_t first, int64_t end) {
  if (row.format == Format::e4m3)
    return ordinary ? decode_groups<OrdinaryE4m3Run>(dst, row, scales, group, first, end)
                    : decode_groups<E4m3Run>(dst, row, scales, group, first, end);
  if (row.format == Format::int8)
    return row.zeros ? decode_groups<Int8Run<ordinary, true>>(dst, row, scales, group, first, end)
                     : decode_groups<Int8Run<ordinary, false>>(dst, row, scales, group, first, end);
  if (ordinary && row.group == 32 && !row.zeros && first % 32 == 0) {
    const int64_t pairs = (end - first) / 64;
    decode_pairs_of_32(dst, row.codes + first / 2, row.ahead, scales, pairs, codebook(row.format));
    dst += 64 * pairs;
    first += 64 * pairs;
    group += 2 * pairs;
    scales += 2 * pairs;
  }
  row.zeros ? decode_groups<FourBitRun<ordinary, true>>(dst, row, scales, group, first, end)
            : decode_groups<FourBitRun<ordinary, false>>(dst, row, scales, group, first, end);
}

// As many groups of columns at a time as there is room for their scales.
inline void decode_by_rows(bf16* dst, int64_t ldd, const Codes& codes, int rows, int64_t first, int64_t count) {
  constexpr int kGroups = 64;
  alignas(64) float scales[kGroups];
  const int64_t end = first + count;
  int64_t group = first / codes.group;
  for (int64_t i = first, stop; i < end; i = stop, group += kGroups) {
    stop = (group + kGroups) * codes.group < end ? (group + kGroups) * codes.group : end;
    const int groups = int((stop - 1) / codes.group - group) + 1;
    bool ordinary = true;
    Codes row = codes;
    for (int r = 0; r < rows; r++, row.next_row()) {
      if (r == 0 || row.group_row == 0) ordinary = load_scales(scales, row, group, groups);
      bf16* to = dst + r * ldd + i - first;
      if (ordinary)
        decode_row<true>(to, row, scales, group, i, stop);
      else
        decode_row<false>(to, row, scales, group, i, stop);
    }
  }
}

// The weights of the 128 magnitudes of e4m3 with one scale, looked up 64 at a time by AVX512-VBMI, which not every processor
// with AVX-512 has. The low and the high bytes of the weights are tables of their own.
#define KTLIB_VBMI __attribute__((target("avx512vbmi")))

KTLIB_VBMI inline void decode_by_table(bf16* dst, int64_t ldd, Codes row, int rows, float scale, int64_t first,
                                       int64_t count) {
  alignas(64) uint8_t magnitudes[128], even[64];
  for (int i = 0; i < 128; i++) magnitudes[i] = uint8_t(i);
  for (int i = 0; i < 64; i++) even[i] = uint8_t(2 * i);
  const OrdinaryE4m3Run run(row, scale, 0.0f);
  const __m512i low_bytes = _mm512_load_si512(even), high_bytes = _mm512_or_si512(low_bytes, _mm512_set1_epi8(1));
  __m512i low[2], high[2];
  for (int i = 0; i < 2; i++) {
    const __m512i a = run.weights<true>(magnitudes + 64 * i, 32), b = run.weights<true>(magnitudes + 64 * i + 32, 32);
    low[i] = _mm512_permutex2var_epi8(a, low_bytes, b);
    high[i] = _mm512_permutex2var_epi8(a, high_bytes, b);
  }
  // Unpacking takes the first half of each lane, then the second.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i one = _mm512_set1_epi8(1), sign = _mm512_set1_epi8(-128);
  for (int r = 0; r < rows; r++, dst += ldd, row.next_row()) {
    const uint8_t* codes = row.codes + first;
    for (int64_t i = 0; i < count; i += 64) {
      const int64_t left = count - i;
      __builtin_prefetch(codes + i + row.ahead, 0, 2);
      const __mmask64 valid = left >= 64 ? ~0ull : (1ull << left) - 1;
      const __m512i raw = left >= 64 ? _mm512_loadu_si512(codes + i) : _mm512_maskz_loadu_epi8(valid, codes + i);
      const __m512i code = _mm512_permutexvar_epi64(order, raw);
      // The sum's first bit is the sign of the code, but of the two codes that are NaN it is zero.
      const __m512i sum = _mm512_adds_epi8(code, one);
      const __m512i l = _mm512_permutex2var_epi8(low[0], code, low[1]);
      const __m512i h = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], code, high[1]), sum, sign,
                                                  0x78);  // a ^ (b & c)
      const __m512i w0 = _mm512_unpacklo_epi8(l, h), w1 = _mm512_unpackhi_epi8(l, h);
      if (left >= 64) {
        _mm512_storeu_si512(dst + i, w0);
        _mm512_storeu_si512(dst + i + 32, w1);
      } else {
        _mm512_mask_storeu_epi16(dst + i, __mmask32(valid), w0);
        _mm512_mask_storeu_epi16(dst + i + 32, __mmask32(valid >> 32), w1);
      }
    }
  }
}

inline void decode_avx512(bf16* dst, int64_t ldd, const Codes& codes, int rows, int64_t first, int64_t count) {
  constexpr int64_t kWorthATable = 512;  // weights
  static const bool has_vbmi = __builtin_cpu_supports("avx512vbmi");
  const int64_t group_columns = codes.group < count ? codes.group : count;
  const int64_t group_rows = codes.group_rows < rows ? codes.group_rows : rows;
  if (codes.format != Format::e4m3 || !has_vbmi || group_columns * group_rows < kWorthATable)
    return decode_by_rows(dst, ldd, codes, rows, first, count);
  const int64_t end = first + count;
  for (int64_t i = first, stop; i < end; i = stop) {
    const int64_t group = i / codes.group;
    stop = (group + 1) * codes.group < end ? (group + 1) * codes.group : end;
    Codes row = codes;
    for (int r = 0, same; r < rows; r += same) {
      same = row.group_rows - row.group_row < rows - r ? int(row.group_rows - row.group_row) : rows - r;
      alignas(64) float scale[16];
      bf16* to = dst + r * ldd + i - first;
      if (load_scales(scale, row, group, 1) && same * (stop - i) >= kWorthATable)
        decode_by_table(to, ldd, row, same, scale[0], i, stop - i);
      else
        decode_by_rows(to, ldd, row, same, i, stop - i);
      for (int k = 0; k < same; k++) row.next_row();
    }
  }
}
