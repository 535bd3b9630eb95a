// What one instruction set must provide, and the layout that it is provided for.
//
// Every product of the layer, forward and backward, is one micro-kernel:
//
//     c[rows][width] (+)= a[rows][depth] . panel[depth][width]
//
// `a` is row-major bf16 with the contraction contiguous, used where it lies (weights are never copied).
// A panel holds the other operand in groups of sixteen columns, each contiguous with the contraction in pairs:
// `panel[width / 16][depth / 2][16][2]` (bf16). That is what TDPBF16PS and VDPBF16PS read, a tile being 1 KB in one piece,
// and what other instruction sets read just as well. There are two ways to make one:
//     pack_rows   from [width][depth] rows (tokens in the forward pass): a transpose of bf16 pairs
//     pack_pairs  from [depth][width] rows (weights in the backward pass): row 2i and row 2i + 1 interleaved
// Micro-kernels are sequential; blocking and threads belong to the callers (layer/forward_in_place.cpp, layer/backward.cpp).
#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/codes.h"

namespace ktlib {

// Columns of one group of a panel: its width is a multiple of this, and so is that of everything that reads one.
constexpr int kColumns = 16;
// The widest panel that `multiply` takes.
constexpr int kMaxWidth = 64;

enum class Activation : int { silu = 0, gelu, gelu_tanh, swiglu_oai };

// gate, up -> act(gate) * up. Before that the gate is clamped from above, and up from both sides, to `limit` (infinity:
// not at all). gelu is the one with erf. swiglu_oai: gate * sigmoid(alpha * gate) * (up + 1).
struct Gate {
  Activation kind = Activation::silu;
  float limit = __builtin_inff(), alpha = 0.0f;
  bool has_limit() const { return limit < __builtin_inff(); }
};

// Of the inputs of LoRA pairs: an element is zero where its random number is below the threshold (of 2^32), else divided
// by the share of the others. The caller's scaling of the pair has that division in it. threshold 0: no dropout.
struct Dropout {
  int64_t seed = 0;
  uint32_t threshold = 0;
};

static constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Elements from row to row of a scratch matrix of bf16 or fp32: whole cache lines, an odd number of them. Rows a power
// of two apart would compete for a few sets of the L1 cache (16 rows of a tile for 12 ways).
template <class T>
static constexpr int64_t row_stride(int64_t columns) {
  const int64_t line = 64 / int64_t(sizeof(T)), lines = (columns + line - 1) / line;
  return (lines | 1) * line;
}

struct Kernels {
  const char* isa;

  int panel_width;  // preferred width of a token panel in the forward pass, a multiple of kColumns, <= kMaxWidth
  // `multiply` may read `a` (and write `c`) up to the next multiple of row_unit rows; its depth is a multiple of
  // depth_unit, to which the packers pad panels with zeros. Callers keep the memory readable and finite.
  int row_unit, depth_unit;

  // Around the work of one thread in a parallel region, pack_pairs and multiply above all (AMX: tile configuration);
  // either may be null.
  void (*thread_begin)() = nullptr;
  void (*thread_end)() = nullptr;

  // Column i, depth d of the panel = src[rows ? rows[i] : i][d], zero for i >= count and for d >= depth.
  void (*pack_rows)(bf16* panel, int width, const bf16* src, int64_t ld, const int32_t* rows, int count, int depth);

  // Column j, depth d of the panel = src[rows ? rows[d] : d][j], zero for d >= depth and for j >= columns. `panel` points
  // at the first of these depths in a panel of panel_depth. Among each 32 columns the order is the kernel's own;
  // `unpermute` undoes it in the product.
  void (*pack_pairs)(bf16* panel, int64_t panel_depth, int width, const bf16* src, int64_t ld, const int32_t* rows,
                     int depth, int columns);

  // c[r][0..width) (+)= sum_d a[r][d] * panel[d][0..width), fp32 accumulation over the whole depth. `panel` points at the
  // first of these depths in a panel of panel_depth. The sum of several depths after
  // each other, accumulated, has the bits of one call for all of them.
  void (*multiply)(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* panel, int64_t panel_depth, int width,
                   int rows, int depth, bool accumulate);
  void (*unpermute)(float* c, int64_t ldc, int rows, int width);

  // [feature][token] results of the forward pass.
  // h[i] = act(gate[step * i]) * up[step * i], elementwise; step 2 where gates and ups alternate, else 1.
  void (*activate)(const Gate& kind, float* h, const float* gate, const float* up, int step, int64_t count);
  // Column i, depth f of the panel = bf16(c[f][i]); an odd last row is paired with zeros. `panel` points at the first of
  // these depths in a panel of panel_depth.
  void (*interleave)(bf16* panel, int64_t panel_depth, int width, const float* c, int64_t ldc, int features);
  // dst[i][f] = c[f][i] for i < tokens, f < features, as bf16 or as fp32.
  void (*store_rows_bf16)(bf16* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens);
  void (*store_rows_f32)(float* dst, int64_t ld, const float* c, int64_t ldc, int features, int tokens);

  // dst[i] = bf16(scale * src[i])
  void (*round)(bf16* dst, const float* src, float scale, int64_t count);
  // dst[i] = scale * src[i]
  void (*widen)(float* dst, const bf16* src, float scale, int64_t count);

  // One token of the backward pass: dh is d(loss)/d(h) before the routing weight. Overwrites dh with fp32 h,
  // writes dgate, dup (bf16, routing weight applied) and returns <dh, h>, the gradient of the routing weight. step: from
  // one element of gate, up, dgate, dup to the next, as in `activate`.
  float (*gate_backward)(const Gate& kind, float* dh, const bf16* gate, const bf16* up, int step, float weight,
                         bf16* dgate, bf16* dup, int features);

  // The gradient of a LoRA matrix over a block of tokens: grad[r][i] = sum_n (t[r][n] + t[rank + r][n]) * src[n][i] for
  // r < rank, i < columns and n < rows in ascending order, where src[n] stands for src[index[n]] if there is an index.
  void (*rank_grad_bf16)(float* grad, int64_t ld, int rank, const bf16* t, int64_t ldt, const bf16* src, int64_t lds,
                         const int32_t* index, int rows, int columns);
  void (*rank_grad_f32)(float* grad, int64_t ld, int rank, const bf16* t, int64_t ldt, const float* src, int64_t lds,
                        const int32_t* index, int rows, int columns);

  // out[i] = sum_j weights[j] * rows[j][i] in the order of j; weights null = ones. Exactly one of out_bf16, out_f32.
  void (*combine)(bf16* out_bf16, float* out_f32, const float* const* rows, const float* weights, int count,
                  int64_t size);

  // mask[i] = all ones where element first + i of the input of one LoRA pair (`projection`) is kept for a slot, else zero.
  void (*keep_mask)(bf16* mask, const Dropout& dropout, uint32_t projection, int64_t slot, int first, int count);

  // dst[r][i] = the weight in column first + i of row r of the codes, for i < count
  void (*decode)(bf16* dst, int64_t ldd, const Codes& codes, int rows, int64_t first, int64_t count);

  // The instruction set's ceiling: `iterations` of independent products on registers alone; returns the number of
  // floating-point operations done. Null where there is no such ceiling to speak of.
  int64_t (*burn)(int64_t iterations) = nullptr;
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512f();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();
const Kernels& kernels_amx_emulated();

}  // namespace ktlib
