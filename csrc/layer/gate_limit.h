// What forward saves of gate and up is rounded to bf16, and a clamp's gradient is zero beyond its limit: a saved value
// must lie on the same side of the limit as the value itself, or backward would take another branch than forward.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace ktlib {

struct Limit {
  float value, below, above;  // below: the largest bf16 <= value; above: the next one

  explicit Limit(float limit) : value(limit) {
    uint32_t bits;
    std::memcpy(&bits, &limit, 4);
    bits &= 0xffff0000u;
    std::memcpy(&below, &bits, 4);
    bits += 0x10000u;
    std::memcpy(&above, &bits, 4);
  }
  float round_below_limit(float x) const {
    return x > value ? (x < above ? above : x) : (x > below ? below : x);
  }
  float round_within_limit(float x) const { return x < 0.0f ? -round_below_limit(-x) : round_below_limit(x); }
};

// Moves gates and ups that rounding to bf16 could take across the gate's limit, step elements from one to the next.
inline void round_within_limit(const Gate& gate, float* gates, float* ups, int step, int64_t count) {
  const Limit limit(gate.limit);
  for (int64_t i = 0; i < count; i++) {
    gates[i * step] = limit.round_below_limit(gates[i * step]);
    ups[i * step] = limit.round_within_limit(ups[i * step]);
  }
}

}  // namespace ktlib
