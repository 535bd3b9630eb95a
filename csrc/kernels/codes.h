// Quantised weights: how a code becomes a weight. The definition is ktlib/reference/formats.py:
//
//     weight = bf16(scale * (value(code) - zero))
//
// The product is rounded to fp32, then to bf16, both times to nearest even. Every instruction set gives the same bits.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"

namespace ktlib {

// bf16 has no codes. From int4 on a byte holds two codes, the one of the even column in its low half.
enum class Format : int { bf16 = 0, e4m3, int8, int4, nf4, e2m1 };
enum class ScaleType : int { fp32 = 0, bf16, fp16, e8m0 };

static inline bool has_4_bits(Format format) { return format >= Format::int4; }
static inline int64_t row_bytes(Format format, int64_t columns) {
  return format == Format::bf16 ? 2 * columns : has_4_bits(format) ? (columns + 1) / 2 : columns;
}

// The values of the 4-bit codes. NF4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E.
static constexpr float kCodebooks[3][16] = {
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
};
static inline const float* codebook(Format format) { return kCodebooks[int(format) - int(Format::int4)]; }

static inline int64_t scale_bytes(ScaleType type) { return type == ScaleType::fp32 ? 4 : type == ScaleType::e8m0 ? 1 : 2; }

// Rows of a quantised matrix. Rows and columns form groups, each with a scale, and with a zero unless there are none. The
// pointers are those of the first row.
struct Codes {
  Format format;
  ScaleType scale_type;
  const uint8_t* codes;
  const void* scales;
  const int8_t* zeros;
  int64_t group;       // columns of a group; the last one may be short
  int64_t group_rows;  // rows of a group
  int64_t group_row;   // the first row's place in its group
  int64_t row_bytes;   // from row to row of the codes
  int64_t groups;      // of a row
  int64_t ahead = 0;   // bytes from a code to one that is needed soon, which is fetched meanwhile; 0: none

  void next_row() {
    codes += row_bytes;
    if (++group_row < group_rows) return;
    group_row = 0;
    scales = static_cast<const char*>(scales) + groups * scale_bytes(scale_type);
    if (zeros) zeros += groups;
  }
};

}  // namespace ktlib
