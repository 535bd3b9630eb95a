// Packers and transposing stores as plain loops, for instruction sets without their own. Included like
// kernels_common.h, after the file's kDepthUnit. Panels are in natural column order here: nothing to undo.

void pack_rows(bf16* panel, int width, const bf16* src, int64_t ld, const int32_t* rows, int count, int depth) {
  for (int i = 0; i < width; i++) {
    const bf16* row = i < count ? src + (rows ? rows[i] : i) * ld : nullptr;
    for (int d = 0; d < round_up(depth, kDepthUnit); d += 2)
      for (int half = 0; half < 2; half++)
        panel[int64_t(d) * width + 2 * i + half] = row && d + half < depth ? row[d + half] : bf16{0};
  }
}

void pack_pairs(bf16* panel, int width, const bf16* src, int64_t ld, const int32_t* rows, int depth, int columns) {
  for (int d = 0; d < round_up(depth, kDepthUnit); d += 2) {
    const bf16* even = d < depth ? src + (rows ? rows[d] : d) * ld : nullptr;
    const bf16* odd = d + 1 < depth ? src + (rows ? rows[d + 1] : d + 1) * ld : nullptr;
    bf16* pairs = panel + int64_t(d) * width;
    for (int j = 0; j < width; j++) {
      pairs[2 * j] = j < columns && even ? even[j] : bf16{0};
      pairs[2 * j + 1] = j < columns && odd ? odd[j] : bf16{0};
    }
  }
}

void unpermute(float*, int64_t, int, int) {}

void interleave(bf16* panel, int width, const float* c, int64_t ldc, int features) {
  for (int f = 0; f < features; f++)
    for (int i = 0; i < width; i++) panel[int64_t(f & ~1) * width + 2 * i + (f & 1)] = to_bf16(c[f * ldc + i]);
  if (features & 1)
    for (int i = 0; i < width; i++) panel[int64_t(features - 1) * width + 2 * i + 1] = bf16{0};
}

void store_rows_bf16(bf16* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  for (int i = 0; i < tokens; i++)
    for (int f = 0; f < features; f++) dst[i * ld + f] = to_bf16(c[f * ldc + i]);
}

void store_rows_f32(float* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  for (int i = 0; i < tokens; i++)
    for (int f = 0; f < features; f++) dst[i * ld + f] = c[f * ldc + i];
}
