// Which instruction sets this CPU and this operating system allow, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace ktlib {

struct Isa {
  const char* name;
  const Kernels& (*table)();
  std::string missing;  // empty: can run here; else why it cannot
};

// Fastest first.
const std::vector<Isa>& isas();

// The table for `name`, or the fastest that can run here if `name` is empty.
// Throws std::invalid_argument for an unknown name, std::runtime_error for one that cannot run here.
const Kernels& select_isa(const std::string& name);

}  // namespace ktlib
