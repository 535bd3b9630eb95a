// AVX-512 without bf16 products: Skylake to Ice Lake Xeons.
#include <immintrin.h>

#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 2;

#include "kernels/common-inl.h"
#include "kernels/avx512-inl.h"

}  // namespace

const Kernels& kernels_avx512f() {
  static const Kernels table = {
      "avx512f",   48,       1,          kDepthUnit,      nullptr,       nullptr,
      pack_rows,       pack_pairs, multiply, unpermute,       activate,       interleave,    store_rows_bf16,
      store_rows_f32,  round_to_bf16, widen, gate_backward,
      rank_grad<bf16>, rank_grad<float>, combine, keep_mask, burn,
  };
  return table;
}

}  // namespace ktlib
