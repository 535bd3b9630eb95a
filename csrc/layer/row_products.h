// Products with the tokens as the row operand and weights packed on the fly into a panel small enough for L1: the
// backward pass, and the forward pass of weights that are stored transposed.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "layer/lora.h"
#include "layer/moe.h"

namespace ktlib {

// Tokens of one task. They share the packing of the weights, which costs as much as the products of 200 tokens.
constexpr int kRows = 512;
constexpr int kColumnsOut = 512;   // columns of one task: runs of 1 KB of each weight row
constexpr int kDepth = 256;        // weight rows interleaved at a time: a panel of 64 columns is 32 KB, half of L1
constexpr int64_t kLdc = row_stride<float>(kColumnsOut);
constexpr int kDepthRun = 32;      // weight rows read side by side
constexpr int64_t kReadBlock = std::max(kMaxWidth * kDepth, kDepthRun * kColumnsOut);  // elements of one read
constexpr int64_t kPanels = int64_t(kDepth) * kColumnsOut + kReadBlock;  // scratch for the panels and one read

// a[rows][depth] . w: w is [depth][columns], or [columns][depth] where by_column.
struct Term {
  const bf16* a = nullptr;
  int64_t lda = 0;
  const bf16* w = nullptr;
  int64_t ldw = 0;
  int depth = 0;
  bool by_column = false;
  // In place of w and ldw: the weight of an expert, from this row and column on.
  const Weight* weight = nullptr;
  int expert = 0;
  int64_t row = 0, column = 0;

  // Rows [first, first + count) of w, columns [from, from + width). scratch: kReadBlock elements.
  Rows read(const Kernels& k, int64_t first, int count, int64_t from, int64_t width, bf16* scratch) const {
    if (weight)
      return weight->read(k, expert, row + first, count, column + from, width, scratch, count * weight->row_bytes());
    return {w + first * ldw + from, ldw};
  }
};

// The product with an expert's weight, columns [first, ...) of the result.
inline Term term(const bf16* a, int64_t lda, const Weight& weight, int expert, int64_t first, bool by_column) {
  return {.a = a, .lda = lda, .depth = int(by_column ? weight.columns : weight.rows), .by_column = by_column,
          .weight = &weight, .expert = expert, .row = by_column ? first : 0, .column = by_column ? 0 : first};
}

// c[rows][columns] (ld kLdc) = the sum of the terms; those of depth 0 are left out. panels: kPanels elements.
void sum_of_products(const Call& call, float* c, int rows, int columns, std::initializer_list<Term> terms, bf16* panels);

// The inner values of a LoRA pair for a block of token rows, lora.scaling * a . w with lora.rank columns, as high and low
// half (layer/lora.h): to_rows[rows][lora.depth], zero-padded; by_rank[2 * lora.rank][ld], there times weights[row] unless that
// is null. c: a task's scratch.
void lora_inner(const Call& call, const LoraForm& lora, const Term& product, int rows, const float* weights,
                bf16* to_rows, bf16* by_rank, int64_t ld, bf16* panels, float* c);

}  // namespace ktlib
