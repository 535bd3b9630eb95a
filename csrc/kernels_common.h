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

// exp(x) to about 1 ulp by Cody-Waite reduction and a degree-6 Taylor polynomial on [-ln2/2, ln2/2]; saturates instead
// of overflowing, keeps NaN.
inline float fast_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest x / ln2 in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
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

void activate(Gate kind, float* __restrict h, const float* __restrict gate, const float* __restrict up, int64_t count) {
  switch (kind) {
    case Gate::silu:
      for (int64_t i = 0; i < count; i++) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

// d(loss)/d(gate, up) and h of elements that are already fp32; d is d(loss)/d(h) times the routing weight.
// d(silu)/dg = sigma(g) * (1 + g * (1 - sigma(g))).
void activate_backward(Gate kind, float* __restrict h, float* __restrict dgate, float* __restrict dup,
                       const float* __restrict gate, const float* __restrict up, const float* __restrict d, int count) {
  switch (kind) {
    case Gate::silu:
      for (int i = 0; i < count; i++) {
        const float g = gate[i], s = sigmoid(g), act = g * s;
        h[i] = act * up[i];
        dgate[i] = d[i] * up[i] * s * (1.0f + g * (1.0f - s));
        dup[i] = d[i] * act;
      }
  }
}

void widen(float* __restrict dst, const bf16* __restrict src, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i++) dst[i] = scale * to_float(src[i]);
}

// In blocks through small arrays; the sum keeps one partial sum per lane, in a fixed order.
float gate_backward(Gate kind, float* dh, const bf16* gate, const bf16* up, float weight, bf16* dgate, bf16* dup,
                    int features) {
  constexpr int kBlock = 64;
  float sums[kBlock] = {};
  for (int first = 0; first < features; first += kBlock) {
    float g[kBlock], u[kBlock], d[kBlock], h[kBlock], dg[kBlock], du[kBlock];
    const int count = features - first < kBlock ? features - first : kBlock;
    widen(g, gate + first, 1.0f, count);
    widen(u, up + first, 1.0f, count);
    for (int i = 0; i < count; i++) d[i] = weight * dh[first + i];
    activate_backward(kind, h, dg, du, g, u, d, count);
    for (int i = 0; i < count; i++) sums[i] += dh[first + i] * h[i];
    round_to_bf16(dgate + first, dg, 1.0f, count);
    round_to_bf16(dup + first, du, 1.0f, count);
    for (int i = 0; i < count; i++) dh[first + i] = h[i];
  }
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
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
