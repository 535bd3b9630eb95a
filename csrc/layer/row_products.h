// Products with the tokens as the row operand and weights packed on the fly into a panel small enough for L1: the
// backward pass, and the forward pass of weights that are stored transposed.
#pragma once

#include <initializer_list>

#include "layer/lora.h"
#include "layer/moe.h"

namespace ktlib {

// Tokens of one task. They share the packing of the weights, which costs as much as the products of 200 tokens.
constexpr int kRows = 512;
constexpr int kColumnsOut = 512;   // columns of one task: runs of 1 KB of each weight row
constexpr int kDepth = 256;        // weight rows interleaved at a time: a panel of 64 columns is 32 KB, half of L1
constexpr int64_t kLdc = row_stride<float>(kColumnsOut);
constexpr int64_t kPanels = int64_t(kDepth) * kColumnsOut;  // elements of scratch for the panels

// a[rows][depth] . w: w is [depth][columns], or [columns][depth] where by_column.
struct Term {
  const bf16* a;
  int64_t lda;
  const bf16* w;
  int64_t ldw;
  int depth;
  bool by_column;
};

// Columns [first, ...) of a whole matrix w, [depth][columns] or [columns][depth].
inline Term term(const bf16* a, int64_t lda, const bf16* w, int depth, int64_t columns, int64_t first, bool by_column) {
  if (by_column) return {a, lda, w + first * depth, depth, depth, true};
  return {a, lda, w + first, columns, depth, false};
}

// c[rows][columns] (ld kLdc) = the sum of the terms; those of depth 0 are left out. panels: kPanels elements.
void sum_of_products(const Call& call, float* c, int rows, int columns, std::initializer_list<Term> terms, bf16* panels);

// The inner values of a LoRA pair for a block of token rows, lora.scaling * a . w with lora.rank columns, as high and low
// part (layer/lora.h): to_rows[rows][lora.depth], zero-padded; by_rank[2 * lora.rank][ld], there times weights[row] unless that
// is null. c: a task's scratch.
void lora_inner(const Call& call, const LoraForm& lora, const Term& product, int rows, const float* weights,
                bf16* to_rows, bf16* by_rank, int64_t ld, bf16* panels, float* c);

}  // namespace ktlib
