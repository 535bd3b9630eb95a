// The forward pass of one chunk of the batch, for weights that are stored as [in][out].
#pragma once

#include "layer/lora.h"
#include "layer/moe.h"

namespace ktlib {

// As forward_chunk (layer/forward_in_place.cpp). saved_ld: slots of the whole batch.
void forward_chunk_transposed(const Call& call, const Inputs& in, const LoraForm& gate_up_lora,
                             const LoraForm& down_lora, const Matrix& output, const Saved& saved, int64_t saved_ld);

}  // namespace ktlib
