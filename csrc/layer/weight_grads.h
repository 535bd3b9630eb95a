// Gradients of the expert weights (full fine-tuning), the last phase of layer/backward.cpp.
#pragma once

#include "layer/moe.h"
#include "layer/routing.h"

namespace ktlib {

// dy, weight and d_gate_up in sorted rows of the whole batch, which is one chunk where these gradients are wanted.
void weight_grads(const Call& call, const Plan& plan, const Inputs& in, const bf16* saved_gate_up, const bf16* dy,
                  int64_t dy_ld, const float* weight, const bf16* d_gate_up, int64_t d_gate_up_ld, const Grads& grads);

}  // namespace ktlib
