// bfloat16 storage and its two conversions. `static`: each file keeps its own copy, so that one compiled for a newer
// CPU can never stand in for all.
#pragma once

#include <cstdint>

namespace ktlib {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// To nearest, ties to even; NaN stays NaN.
static inline bf16 to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{uint16_t(value == value ? rounded : 0x7fc0u)};
}

}  // namespace ktlib
