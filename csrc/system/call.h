// What belongs to one call of the operator besides its arguments.
#pragma once

#include "kernels/kernels.h"

namespace ktlib {

class Interruption;

struct Call {
  const Kernels& kernels;
  int threads;
  Interruption* interruption = nullptr;  // may end the call early (system/interrupt.h); null: nothing does
};

}  // namespace ktlib
