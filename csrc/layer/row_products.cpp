#include "layer/row_products.h"

#include <cstring>

#include "system/interrupt.h"

namespace ktlib {
namespace {

int panel_width(int columns, int j) { return int(round_up(std::min(kMaxWidth, columns - j), kColumns)); }

// c[rows][columns] (+)= one term, w packed into panels of kMaxWidth columns.
void product(const Call& call, float* c, const Term& term, int rows, int columns, bool accumulate, bf16* panels) {
  const Kernels& k = call.kernels;
  bf16* scratch = panels + int64_t(kDepth) * kColumnsOut;
  for (int d = 0; d < term.depth && !interrupted(call); d += kDepth) {
    const int count = std::min(kDepth, term.depth - d);
    const int64_t padded = round_up(count, k.depth_unit);
    if (term.by_column)
      for (int j = 0; j < columns; j += kMaxWidth) {
        const int width = std::min(kMaxWidth, columns - j);
        const Rows w = term.read(k, j, width, d, count, scratch);
        k.pack_rows(panels + j * padded, panel_width(columns, j), w.data, w.ld, nullptr, width, count);
      }
    else
      for (int run = 0; run < count; run += kDepthRun) {  // long runs of each weight row, for the prefetcher
        const int depth = std::min(kDepthRun, count - run);
        const Rows w = term.read(k, d + run, depth, 0, columns, scratch);
        for (int j = 0; j < columns; j += kMaxWidth)
          k.pack_pairs(panels + j * padded + run * kColumns, padded, panel_width(columns, j), w.data + j, w.ld, nullptr,
                       depth, std::min(kMaxWidth, columns - j));
      }
    for (int j = 0; j < columns; j += kMaxWidth)
      k.multiply(c + j, kLdc, term.a + d, term.lda, panels + j * padded, padded, panel_width(columns, j), rows, int(padded),
                 accumulate || d > 0);
  }
}

}  // namespace

void sum_of_products(const Call& call, float* c, int rows, int columns, std::initializer_list<Term> terms,
                     bf16* panels) {
  bool accumulate = false;
  for (bool by_column : {false, true}) {  // pack_pairs permutes columns, pack_rows does not
    for (const Term& term : terms)
      if (term.depth > 0 && term.by_column == by_column) {
        product(call, c, term, rows, columns, accumulate, panels);
        accumulate = true;
      }
    for (int j = 0; accumulate && !by_column && j < columns; j += kMaxWidth)
      call.kernels.unpermute(c + j, kLdc, rows, panel_width(columns, j));
  }
}

void lora_inner(const Call& call, const LoraForm& lora, const Term& product, int rows, const float* weights,
                bf16* to_rows, bf16* by_rank, int64_t ld, bf16* panels, float* c) {
  static_assert(kColumnsOut >= 2 * kMaxWidth, "the low half lies beside the high half");
  const Kernels& k = call.kernels;
  float* low = c + kMaxWidth;
  for (int r0 = 0; r0 < lora.rank; r0 += kMaxWidth) {
    const int n = std::min(kMaxWidth, lora.rank - r0);
    Term block = product;
    block.w += block.by_column ? r0 * block.ldw : r0;
    sum_of_products(call, c, rows, n, {block}, panels);
    for (int i = 0; i < rows; i++)
      for (int r = 0; r < n; r++) c[i * kLdc + r] *= lora.scaling;
    low_half(low, c, kLdc, rows, n);
    for (int i = 0; i < rows; i++) {
      bf16* row = to_rows + i * lora.depth + r0;
      k.round(row, c + i * kLdc, 1.0f, n);
      k.round(row + lora.rank, low + i * kLdc, 1.0f, n);
    }
    if (!by_rank) continue;
    if (weights) {
      for (int i = 0; i < rows; i++)
        for (int r = 0; r < n; r++) c[i * kLdc + r] *= weights[i];
      low_half(low, c, kLdc, rows, n);
    }
    bf16* dst = by_rank + r0 * ld;
    k.store_rows_bf16(dst, ld, c, kLdc, rows, n);
    k.store_rows_bf16(dst + lora.rank * ld, ld, low, kLdc, rows, n);
  }
  const int padding = lora.depth - 2 * lora.rank;
  for (int i = 0; i < rows; i++)
    std::memset(to_rows + i * lora.depth + 2 * lora.rank, 0, size_t(padding) * sizeof(bf16));
}

}  // namespace ktlib
