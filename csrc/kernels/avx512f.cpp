// AVX-512 without bf16 products: Skylake to Ice Lake Xeons.
#include <immintrin.h>

#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 2;

#include "kernels/common-inl.h"
#include "kernels/decode-inl.h"
#include "kernels/avx512-inl.h"
#include "kernels/decode-avx512-inl.h"

}  // namespace

const Kernels& kernels_avx512f() {
  static const Kernels table = {
      .isa = "avx512f", .panel_width = 48, .row_unit = 1, .depth_unit = kDepthUnit,
      .pack_rows = pack_rows, .pack_pairs = pack_pairs, .multiply = multiply,
      .unpermute = unpermute, .activate = activate, .interleave = interleave,
      .store_rows_bf16 = store_rows_bf16, .store_rows_f32 = store_rows_f32, .round = round_to_bf16, .widen = widen,
      .gate_backward = gate_backward, .rank_grad_bf16 = rank_grad<bf16>, .rank_grad_f32 = rank_grad<float>,
      .combine = combine, .keep_mask = keep_mask, .decode = decode_avx512, .burn = burn,
  };
  return table;
}

}  // namespace ktlib
