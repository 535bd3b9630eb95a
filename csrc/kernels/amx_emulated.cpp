// The AMX kernel on emulated tiles, for tests on machines without AMX. Packers and stores are the portable loops.
#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 32;

#include "kernels/common-inl.h"
#include "kernels/decode-inl.h"
#include "kernels/loops-inl.h"
#include "kernels/tiles.h"
#include "kernels/amx-inl.h"

}  // namespace

const Kernels& kernels_amx_emulated() {
  static const Kernels table = {
      .isa = "amx_emulated", .panel_width = 64, .row_unit = 16, .depth_unit = kDepthUnit,
      .pack_rows = pack_rows, .pack_pairs = pack_pairs, .multiply = multiply<EmulatedTiles>,
      .unpermute = unpermute, .activate = activate, .interleave = interleave,
      .store_rows_bf16 = store_rows_bf16, .store_rows_f32 = store_rows_f32, .round = round_to_bf16, .widen = widen,
      .gate_backward = gate_backward, .rank_grad_bf16 = rank_grad<bf16>, .rank_grad_f32 = rank_grad<float>,
      .combine = combine, .keep_mask = keep_mask, .decode = decode<ScalarRuns>,
  };
  return table;
}

}  // namespace ktlib
