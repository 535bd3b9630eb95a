// Dropout on the inputs of LoRA pairs. It drops by zeroing bits, and only what LoRA reads: the products with the weights
// see their input whole. Which elements are kept is computed where it is needed, in each pass anew, and never stored.
#pragma once

#include "layer/lora.h"
#include "layer/moe.h"
#include "layer/routing.h"

namespace ktlib {

// The masks of one LoRA pair's input in one chunk of the batch, by sorted rows: all ones where an element is kept.
class InputMask {
 public:
  enum Projection : uint32_t { gate_up, down };

  InputMask(const Kernels& k, const Inputs& in, const LoraForm& lora, const Plan& plan, Projection projection)
      : k_(k), dropout_(in.settings.dropout), projection_(projection), first_slot_(in.first_slot),
        slot_of_row_(plan.slot_of_row.data()), on_(lora && in.settings.dropout.threshold > 0) {}
  explicit operator bool() const { return on_; }  // false: nothing is dropped

  // mask[i][0..count) (ld) = columns [first, first + count) of row `row + i`.
  void fill(bf16* mask, int64_t ld, int64_t row, int rows, int first, int count) const {
    for (int i = 0; i < rows; i++)
      k_.keep_mask(mask + i * ld, dropout_, projection_, first_slot_ + slot_of_row_[row + i], first, count);
  }

 private:
  const Kernels& k_;
  Dropout dropout_;
  Projection projection_;
  int64_t first_slot_;
  const int32_t* slot_of_row_;
  bool on_;
};

// dst = a & b, where dst may be one of them.
inline void keep(bf16* dst, const bf16* a, const bf16* b, int64_t count) {
  for (int64_t i = 0; i < count; i++) dst[i].bits = a[i].bits & b[i].bits;
}

// What an element of the mask keeps of a value; on bits, which is vectorized where a choice between floats is not.
inline float kept(float value, bf16 mask) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits &= uint32_t(int16_t(mask.bits));
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline void keep(float* values, const bf16* mask, int count) {
  for (int i = 0; i < count; i++) values[i] = kept(values[i], mask[i]);
}

// sum += what the mask keeps of term.
inline void add_kept(float* sum, const float* term, const bf16* mask, int count) {
  for (int i = 0; i < count; i++) sum[i] += kept(term[i], mask[i]);
}

// Zero, or NaN if a term is NaN or infinite: what an input's dropped elements, as zeros, are worth in their product with
// such a matrix.
inline float zero_times(const float* term, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; i++) sum += 0.0f * term[i];
  return sum;
}

// Scratch, in elements, of multiply_kept.
constexpr int kKeptDepth = 256;
constexpr int64_t kKeptScratch = 2 * kMaxWidth * kKeptDepth;

// c[rows of lora_A][width] = lora_A . what is kept of a panel of `tokens` rows from `row` on: the masks are packed like
// the rows themselves.
void multiply_kept(const Kernels& k, const InputMask& mask, float* c, const LoraForm& lora, int expert,
                   const bf16* panel, int width, int64_t row, int tokens, bf16* scratch);

// masks[i][0..columns) = those of the input rows slots[i] of a batch, for whoever computes them elsewhere.
void keep_masks(const Call& call, bf16* masks, const Dropout& dropout, uint32_t projection,
                const int64_t* slots, int64_t rows, int columns);

}  // namespace ktlib
