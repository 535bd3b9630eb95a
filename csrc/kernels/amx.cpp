// AMX-BF16: Sapphire Rapids and later Xeons. Packers and stores are AVX-512's.
#include <immintrin.h>

#define KTLIB_HARDWARE_TILES
#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 32;

#include "kernels/common-inl.h"
#include "kernels/decode-inl.h"
#include "kernels/tiles.h"
namespace avx512 {
#include "kernels/avx512-inl.h"
#include "kernels/decode-avx512-inl.h"
}
#include "kernels/amx-inl.h"

// The tile unit falls asleep after some ten microseconds without work and takes three to wake. Packing weights takes
// longer than that, so it gives the unit a product now and then, of whatever the tiles hold, to one that is not in use.
void pack_pairs_awake(bf16* panel, int64_t panel_depth, int width, const bf16* src, int64_t ld, const int32_t* rows,
                      int depth, int columns) {
  HardwareTiles::dot<0, 4, 6>();
  avx512::pack_pairs(panel, panel_depth, width, src, ld, rows, depth, columns);
}

}  // namespace

const Kernels& kernels_amx() {
  using namespace avx512;
  static const Kernels table = {
      .isa = "amx_bf16", .panel_width = 64, .row_unit = 16, .depth_unit = kDepthUnit,
      .thread_begin = HardwareTiles::configure, .thread_end = HardwareTiles::release,
      .pack_rows = pack_rows, .pack_pairs = pack_pairs_awake, .multiply = ktlib::multiply<HardwareTiles>,
      .unpermute = unpermute, .activate = activate, .interleave = interleave,
      .store_rows_bf16 = store_rows_bf16, .store_rows_f32 = store_rows_f32, .round = round_to_bf16, .widen = widen,
      .gate_backward = gate_backward, .rank_grad_bf16 = rank_grad<bf16>, .rank_grad_f32 = rank_grad<float>,
      .combine = combine, .keep_mask = keep_mask, .decode = decode_avx512, .burn = ktlib::burn<HardwareTiles>,
  };
  return table;
}

}  // namespace ktlib
