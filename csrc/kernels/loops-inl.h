// Packers and transposing stores as plain loops, for instruction sets without their own. Included like
// kernels/common-inl.h, after the file's kDepthUnit. Panels are in natural column order here: nothing to undo.

void pack_rows(bf16* panel, int width, const bf16* src, int64_t ld, const int32_t* rows, int count, int depth) {
  const int64_t padded = round_up(depth, kDepthUnit);
  for (int i = 0; i < width; i++) {
    const bf16* row = i < count ? src + (rows ? rows[i] : i) * ld : nullptr;
    bf16* column = panel + i / kColumns * kColumns * padded + i % kColumns * 2;
    for (int d = 0; d < padded; d += 2)
      for (int half = 0; half < 2; half++)
        column[int64_t(d) * kColumns + half] = row && d + half < depth ? row[d + half] : bf16{0};
  }
}

void pack_pairs(bf16* panel, int64_t panel_depth, int width, const bf16* src, int64_t ld, const int32_t* rows, int depth,
                int columns) {
  for (int d = 0; d < round_up(depth, kDepthUnit); d += 2) {
    const bf16* even = d < depth ? src + (rows ? rows[d] : d) * ld : nullptr;
    const bf16* odd = d + 1 < depth ? src + (rows ? rows[d + 1] : d + 1) * ld : nullptr;
    for (int j = 0; j < width; j++) {
      bf16* pair = panel + j / kColumns * kColumns * panel_depth + d * kColumns + j % kColumns * 2;
      pair[0] = j < columns && even ? even[j] : bf16{0};
      pair[1] = j < columns && odd ? odd[j] : bf16{0};
    }
  }
}

void unpermute(float*, int64_t, int, int) {}

void interleave(bf16* panel, int64_t panel_depth, int width, const float* c, int64_t ldc, int features) {
  for (int f = 0; f < round_up(features, 2); f++)
    for (int i = 0; i < width; i++)
      panel[i / kColumns * kColumns * panel_depth + (f & ~1) * kColumns + i % kColumns * 2 + (f & 1)] =
          f < features ? to_bf16(c[f * ldc + i]) : bf16{0};
}

void store_rows_bf16(bf16* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  for (int i = 0; i < tokens; i++)
    for (int f = 0; f < features; f++) dst[i * ld + f] = to_bf16(c[f * ldc + i]);
}

void store_rows_f32(float* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens) {
  for (int i = 0; i < tokens; i++)
    for (int f = 0; f < features; f++) dst[i * ld + f] = c[f * ldc + i];
}
