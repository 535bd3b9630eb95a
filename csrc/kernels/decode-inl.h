// Decoding rows of quantised weights (kernels/codes.h). Included like kernels/common-inl.h, after it.

inline float e4m3_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = uint32_t(code & 0x80u) << 24;
  if (magnitude == 0x7f) return __builtin_nanf("");
  // The exponent's bias is 7 in place of 127. A subnormal code m is m * 2^-9, where a leading one makes 2^-7 + m * 2^-10 of
  // it. (Subnormal numbers as operands would cost an assist of the microcode each.)
  const float normal = bits_to_float((magnitude << 20) + (120u << 23));
  const float value = magnitude < 8 ? 2.0f * (normal - 0x1p-7f) : normal;
  return bits_to_float(float_to_bits(value) | sign);
}

// The first sixteen values of e4m3: the subnormal ones, and those with the smallest exponent.
static constexpr float kE4m3Values[16] = {0x0p-9f, 0x1p-9f, 0x2p-9f,  0x3p-9f,  0x4p-9f,  0x5p-9f,  0x6p-9f,  0x7p-9f,
                                          0x8p-9f, 0x9p-9f, 0xap-9f, 0xbp-9f, 0xcp-9f, 0xdp-9f, 0xep-9f, 0xfp-9f};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = uint32_t(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | 0x70000000u | magnitude);  // infinity or NaN
  return bits_to_float(sign | magnitude) * 0x1p112f;  // the exponent's bias is 15 in place of 127
}

inline float scale_of(const Codes& row, int64_t group) {
  switch (row.scale_type) {
    case ScaleType::fp32: {
      float scale;
      __builtin_memcpy(&scale, static_cast<const char*>(row.scales) + group * int64_t(sizeof(float)), sizeof(float));
      return scale;
    }
    case ScaleType::e8m0: {
      const uint32_t exponent = static_cast<const uint8_t*>(row.scales)[group];
      return exponent == 255 ? __builtin_nanf("") : bits_to_float(exponent == 0 ? 0x00400000u : exponent << 23);
    }
    default: {
      bf16 scale;
      __builtin_memcpy(&scale, static_cast<const char*>(row.scales) + group * int64_t(sizeof(bf16)), sizeof(bf16));
      return row.scale_type == ScaleType::bf16 ? to_float(scale) : half_to_float(scale.bits);
    }
  }
}

// Runs of codes that share scale and zero, one element after the other.
struct ScalarRuns {
  static void e4m3(bf16* dst, const uint8_t* codes, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i++) dst[i] = to_bf16(scale * e4m3_to_float(codes[i]));
  }
  static void int8(bf16* dst, const uint8_t* codes, int64_t count, float scale, float zero) {
    for (int64_t i = 0; i < count; i++) dst[i] = to_bf16(scale * (float(int8_t(codes[i])) - zero));
  }
  // Codes [first, first + count) of a row.
  static void four_bits(bf16* dst, const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale,
                        float zero) {
    bf16 table[16];
    for (int i = 0; i < 16; i++) table[i] = to_bf16(scale * (codebook[i] - zero));
    for (int64_t i = first; i < first + count; i++) dst[i - first] = table[codes[i / 2] >> (i % 2 * 4) & 15];
  }
};

// A run within one group of a row.
template <class Runs>
inline void decode_run(bf16* dst, const Codes& row, int64_t first, int64_t count, float scale, float zero) {
  if (row.format == Format::e4m3)
    Runs::e4m3(dst, row.codes + first, count, scale);
  else if (row.format == Format::int8)
    Runs::int8(dst, row.codes + first, count, scale, zero);
  else
    Runs::four_bits(dst, row.codes, first, count, codebook(row.format), scale, zero);
}

// For a short run. (All lines of a row at once were slower: a layer on 8 tokens took 6.5 to 8.9 ms in place of 5.4 to 7.0.)
inline void fetch_ahead(const Codes& row, int64_t first, int64_t count) {
  if (row.ahead == 0) return;
  const uint8_t* codes = row.codes + row.ahead;
  const int64_t end = row_bytes(row.format, first + count);
  for (int64_t i = row_bytes(row.format, first); i < end; i += 64) __builtin_prefetch(codes + i, 0, 2);
}

template <class Runs>
void decode(bf16* dst, int64_t ldd, const Codes& codes, int rows, int64_t first, int64_t count) {
  const int64_t end = first + count, first_group = first / codes.group;
  Codes row = codes;
  for (int r = 0; r < rows; r++, dst += ldd, row.next_row()) {
    int64_t group = first_group;
    for (int64_t i = first, stop; i < end; i = stop, group++) {
      stop = (group + 1) * row.group < end ? (group + 1) * row.group : end;
      fetch_ahead(row, i, stop - i);
      decode_run<Runs>(dst + i - first, row, i, stop - i, scale_of(row, group),
                       row.zeros ? float(row.zeros[group]) : 0.0f);
    }
  }
}
