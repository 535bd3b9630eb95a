// AVX512-BF16: Cooper Lake, Sapphire Rapids and later Xeons, Zen 4 and later.
#include <immintrin.h>

#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 2;

#include "kernels/common-inl.h"
#include "kernels/avx512-inl.h"

}  // namespace

const Kernels& kernels_avx512_bf16() {
  static const Kernels table = {
      "avx512_bf16",   48,       1,          kDepthUnit,      nullptr,       nullptr,
      pack_rows,       pack_pairs, multiply, unpermute,       activate,       interleave,    store_rows_bf16,
      store_rows_f32,  round_to_bf16, widen, gate_backward,
      rank_grad<bf16>, rank_grad<float>, combine, keep_mask, burn,
  };
  return table;
}

}  // namespace ktlib
