// Plain loops that every instruction set shares: compiled once per kernels_*.cpp with that file's flags, where the
// compiler vectorizes them. Included inside that file's anonymous namespace; uses no std function.

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// exp(x + tail), tail being small, to about 1 ulp by Cody-Waite reduction and a degree-6 Taylor polynomial on
// [-ln2/2, ln2/2]; infinity from 88.4 on and zero from -87.7 down, where the power of two has no normal number; keeps
// NaN. It must not stop short of them: a gate times the smallest normal number may be large.
template <class... Tail>
inline float fast_exp(float x, Tail... tail) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -88.0f ? -88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest x / ln2 in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (((x - n * 0.693145752f) - n * 1.42860677e-6f) + ... + tail);
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

void round_to_bf16(bf16* __restrict dst, const float* __restrict src, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i++) dst[i] = to_bf16(scale * src[i]);
}

#include "kernels/dropout-inl.h"
#include "kernels/gates-inl.h"

void widen(float* __restrict dst, const bf16* __restrict src, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i++) dst[i] = scale * to_float(src[i]);
}

// Gates, or ups, out of a row where they alternate.
void every_second(float* __restrict dst, const float* __restrict src, int count) {
  for (int i = 0; i < count; i++) dst[i] = src[2 * i];
}

void every_second(float* __restrict dst, const bf16* __restrict src, int count) {
  for (int i = 0; i < count; i++) dst[i] = to_float(src[2 * i]);
}

void activate(const Gate& gate, float* h, const float* g, const float* u, int step, int64_t count) {
  const GateForward forward = kGateForward[int(gate.kind)][gate.has_limit()];
  if (step == 1) return forward(gate, h, g, u, count);
  constexpr int kBlock = 64;
  for (int64_t first = 0; first < count; first += kBlock) {
    float every_g[kBlock], every_u[kBlock];
    const int n = count - first < kBlock ? int(count - first) : kBlock;
    every_second(every_g, g + 2 * first, n);
    every_second(every_u, u + 2 * first, n);
    forward(gate, h + first, every_g, every_u, n);
  }
}

// In blocks through small arrays; the sum keeps one partial sum per lane, in a fixed order.
float gate_backward(const Gate& gate, float* dh, const bf16* g, const bf16* u, int step, float weight, bf16* dgate,
                    bf16* dup, int features) {
  constexpr int kBlock = 64;
  const GateBackward backward = kGateBackward[int(gate.kind)][gate.has_limit()];
  float sums[kBlock] = {};
  for (int first = 0; first < features; first += kBlock) {
    float gates[kBlock], ups[kBlock], d[kBlock], h[kBlock], dg[kBlock], du[kBlock];
    const int count = features - first < kBlock ? features - first : kBlock;
    const int64_t at = int64_t(first) * step;
    if (step == 1) {
      widen(gates, g + at, 1.0f, count);
      widen(ups, u + at, 1.0f, count);
    } else {
      every_second(gates, g + at, count);
      every_second(ups, u + at, count);
    }
    for (int i = 0; i < count; i++) d[i] = weight * dh[first + i];
    backward(gate, h, dg, du, gates, ups, d, count);
    for (int i = 0; i < count; i++) sums[i] += dh[first + i] * h[i];
    if (step == 1) {
      round_to_bf16(dgate + at, dg, 1.0f, count);
      round_to_bf16(dup + at, du, 1.0f, count);
    } else {
      for (int i = 0; i < count; i++) dgate[at + 2 * i] = to_bf16(dg[i]);
      for (int i = 0; i < count; i++) dup[at + 2 * i] = to_bf16(du[i]);
    }
    for (int i = 0; i < count; i++) dh[first + i] = h[i];
  }
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

// sums[r][i] += scale[r][0] * rows[0][i] + scale[r][1] * rows[1][i] + ..., one after the other, for `ranks` sums.
constexpr int kRankBlock = 4, kRankRows = 4;
template <int ranks>
inline void add_rows(float* sums, int64_t ld, const float* const* rows, const float (&scales)[kRankBlock][kRankRows],
                     int count) {
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  float scale[ranks][kRankRows];  // in registers, which no store to sums can change
#pragma GCC unroll 4
  for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
    for (int k = 0; k < kRankRows; k++) scale[r][k] = scales[r][k];
#pragma GCC ivdep
  for (int i = 0; i < count; i++) {
    const float w = a[i], x = b[i], y = c[i], z = d[i];
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++) {
      float sum = sums[r * ld + i];
      sum += scale[r][0] * w;
      sum += scale[r][1] * x;
      sum += scale[r][2] * y;
      sum += scale[r][3] * z;
      sums[r * ld + i] = sum;
    }
  }
}

// So little of it is arithmetic, a few products for each element read, that packing it for `multiply` would take longer.
template <class T>
void rank_grad(float* grad, int64_t ld, int rank, const bf16* t, int64_t ldt, const T* src, int64_t lds,
               const int32_t* index, int rows, int columns) {
  constexpr int kBlock = 512;
  constexpr decltype(&add_rows<1>) kAdd[] = {nullptr, add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>};
  alignas(64) float wide[kRankRows][kBlock];
  for (int first = 0; first < columns; first += kBlock) {
    const int count = columns - first < kBlock ? columns - first : kBlock;
    for (int r = 0; r < rank; r++) __builtin_memset(grad + r * ld + first, 0, count * sizeof(float));
    for (int n = 0; n < rows; n += kRankRows) {
      const float* row[kRankRows];
      const int left = rows - n < kRankRows ? rows - n : kRankRows;
      for (int k = 0; k < kRankRows; k++) {
        row[k] = wide[k];
        const T* from = src + (index && k < left ? index[n + k] : n + k) * lds + first;
        if (k >= left)
          __builtin_memset(wide[k], 0, count * sizeof(float));
        else if constexpr (sizeof(T) == sizeof(float))
          row[k] = from;
        else
          widen(wide[k], from, 1.0f, count);
      }
      for (int r = 0; r < rank; r += kRankBlock) {
        const int ranks = rank - r < kRankBlock ? rank - r : kRankBlock;
        float scale[kRankBlock][kRankRows] = {};
        for (int q = 0; q < ranks; q++)
          for (int k = 0; k < left; k++)
            scale[q][k] = to_float(t[(r + q) * ldt + n + k]) + to_float(t[(rank + r + q) * ldt + n + k]);
        kAdd[ranks](grad + r * ld + first, ld, row, scale, count);
      }
    }
  }
}

void combine(bf16* out_bf16, float* out_f32, const float* const* rows, const float* weights, int count, int64_t size) {
  constexpr int kBlock = 64;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int n = size - i < kBlock ? int(size - i) : kBlock;
    float sum[kBlock] = {};
    for (int j = 0; j < count; j++) {
      const float weight = weights ? weights[j] : 1.0f;
      const float* row = rows[j] + i;
      if (n == kBlock)
        for (int lane = 0; lane < kBlock; lane++) sum[lane] += weight * row[lane];
      else
        for (int lane = 0; lane < n; lane++) sum[lane] += weight * row[lane];
    }
    for (int lane = 0; lane < n; lane++) {
      if (out_bf16) out_bf16[i + lane] = to_bf16(sum[lane]);
      if (out_f32) out_f32[i + lane] = sum[lane];
    }
  }
}
