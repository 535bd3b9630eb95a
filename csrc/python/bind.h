// What the two files of Python's entry share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace ktlib {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Adds the entries of one instruction set's table, for tests: addresses and sizes as in kernels/kernels.h.
void bind_kernels(nanobind::module_& m);

}  // namespace ktlib
