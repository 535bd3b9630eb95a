// The AMX kernel on emulated tiles, for tests on machines without AMX. Packers and stores are the portable loops.
#include "kernels/kernels.h"

namespace ktlib {
namespace {

constexpr int kDepthUnit = 32;

#include "kernels/common-inl.h"
#include "kernels/loops-inl.h"
#include "kernels/tiles.h"
#include "kernels/amx-inl.h"

}  // namespace

const Kernels& kernels_amx_emulated() {
  static const Kernels table = {
      "amx_emulated",  64,       16,         kDepthUnit,      nullptr,       nullptr,
      pack_rows,       pack_pairs, multiply<EmulatedTiles>, unpermute, activate, interleave, store_rows_bf16,
      store_rows_f32,  round_to_bf16, widen, gate_backward,
      rank_grad<bf16>, rank_grad<float>, combine, keep_mask, nullptr,
  };
  return table;
}

}  // namespace ktlib
