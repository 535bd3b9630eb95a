// The gates as plain loops. Included by kernels/common-inl.h.

// Phi(-a) * exp(a^2 / 2) for a >= 0, Phi being the normal distribution: a polynomial in (a - 4) / (a + 4) over 1 + a,
// fitted on [0, 14] to 2e-9.
inline float scaled_tail(float a) {
  const float q = (a - 4.0f) / (a + 4.0f);
  float p = -7.19952427e-05f;
  p = p * q - 6.12790581e-05f;
  p = p * q + 0.000692905669f;
  p = p * q - 0.00030304567f;
  p = p * q - 0.00500416921f;
  p = p * q + 0.0179399962f;
  p = p * q - 0.0321973466f;
  p = p * q + 0.0286000013f;
  p = p * q + 0.0139996031f;
  p = p * q - 0.0967034675f;
  p = p * q + 0.472053207f;
  return p / (1.0f + a);
}

inline float clamp_above(float x, float limit) { return x > limit ? limit : x; }  // NaN stays NaN
inline float clamp_both(float x, float limit) { return clamp_above(x < -limit ? -limit : x, limit); }

// The activation of a gate at g, and its derivative.
struct Activated {
  float value, slope;
};

template <Activation kind>
inline Activated act(float g, float alpha) {
  if constexpr (kind == Activation::silu) {
    const float s = sigmoid(g);
    return {g * s, s * (1.0f + g * (1.0f - s))};
  } else if constexpr (kind == Activation::swiglu_oai) {
    constexpr float kBeyond = 100.0f;  // the sigmoid is 0 or 1 here, and infinity times 0 would be NaN
    const float z = clamp_both(alpha * g, kBeyond), s = sigmoid(z);
    return {g * s, s * (1.0f + z * (1.0f - s))};
  } else if constexpr (kind == Activation::gelu_tanh) {
    // (1 + tanh(z)) / 2 = sigmoid(2z), which keeps its relative precision in the lower tail
    constexpr float kLinear = 1.59576912f, kCubic = 0.0713548162f;  // 2 sqrt(2 / pi), times 0.044715
    const float square = g * g, bounded = square > 1e4f ? 1e4f : square;
    const float s = sigmoid(g * (kLinear + kCubic * bounded));
    return {g * s, s + g * s * (1.0f - s) * (kLinear + 3.0f * kCubic * bounded)};
  } else {
    const float size = g < 0.0f ? -g : g, a = size > 14.0f ? 14.0f : size;
    const float high = bits_to_float(float_to_bits(a) & 0xfffff000u);  // its square is exact
    const float e = fast_exp(-0.5f * high * high, -0.5f * (a - high) * (a + high));
    const float tail = scaled_tail(a) * e, phi = g < 0.0f ? tail : 1.0f - tail;
    return {g * phi, phi + g * e * 0.398942280f};
  }
}

template <Activation kind>
constexpr float kUpOffset = kind == Activation::swiglu_oai ? 1.0f : 0.0f;

template <Activation kind, bool clamped>
void activate_as(const Gate& gate, float* __restrict h, const float* __restrict g, const float* __restrict u,
                 int64_t count) {
  const float limit = gate.limit, alpha = gate.alpha;
  for (int64_t i = 0; i < count; i++) {
    const float value = act<kind>(clamped ? clamp_above(g[i], limit) : g[i], alpha).value;
    const float up = clamped ? clamp_both(u[i], limit) : u[i];
    h[i] = value * (kUpOffset<kind> != 0.0f ? up + kUpOffset<kind> : up);
  }
}

// As torch.clamp, the gradient passes at the limit itself and is zero beyond.
template <Activation kind, bool clamped>
void activate_backward_as(const Gate& gate, float* __restrict h, float* __restrict dgate, float* __restrict dup,
                          const float* __restrict g, const float* __restrict u, const float* __restrict d, int count) {
  const float limit = gate.limit, alpha = gate.alpha;
  for (int i = 0; i < count; i++) {
    const Activated a = act<kind>(clamped ? clamp_above(g[i], limit) : g[i], alpha);
    float up = clamped ? clamp_both(u[i], limit) : u[i];
    if (kUpOffset<kind> != 0.0f) up += kUpOffset<kind>;
    h[i] = a.value * up;
    const float dg = d[i] * up * a.slope, du = d[i] * a.value;
    dgate[i] = clamped && g[i] > limit ? 0.0f : dg;
    dup[i] = clamped && (u[i] > limit || u[i] < -limit) ? 0.0f : du;
  }
}

// By activation, and by whether there is a limit.
using GateForward = void (*)(const Gate&, float*, const float*, const float*, int64_t);
constexpr GateForward kGateForward[][2] = {
    {activate_as<Activation::silu, false>, activate_as<Activation::silu, true>},
    {activate_as<Activation::gelu, false>, activate_as<Activation::gelu, true>},
    {activate_as<Activation::gelu_tanh, false>, activate_as<Activation::gelu_tanh, true>},
    {activate_as<Activation::swiglu_oai, false>, activate_as<Activation::swiglu_oai, true>},
};
using GateBackward = void (*)(const Gate&, float*, float*, float*, const float*, const float*, const float*, int);
constexpr GateBackward kGateBackward[][2] = {
    {activate_backward_as<Activation::silu, false>, activate_backward_as<Activation::silu, true>},
    {activate_backward_as<Activation::gelu, false>, activate_backward_as<Activation::gelu, true>},
    {activate_backward_as<Activation::gelu_tanh, false>, activate_backward_as<Activation::gelu_tanh, true>},
    {activate_backward_as<Activation::swiglu_oai, false>, activate_backward_as<Activation::swiglu_oai, true>},
};
