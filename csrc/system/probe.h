// What the machine can do at best: the ceilings that measured rates are compared with.
#pragma once

#include "kernels/kernels.h"

namespace ktlib {

// Floating-point operations per second of `threads` threads on registers alone, best of `repeats`; 0 if not defined.
double peak_rate(const Kernels& k, int threads, int repeats);
// Bytes per second that `threads` threads read from `bytes` of memory together, best of `repeats`.
double read_rate(int threads, int64_t bytes, int repeats);

}  // namespace ktlib
