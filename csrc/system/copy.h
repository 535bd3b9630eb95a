// memcpy by many threads, one alone reaching a fraction of the memory's bandwidth.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace ktlib {

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};
using Piece = std::vector<Copy>;

// Copies piece after piece: ready(i), on the calling thread, once piece i is complete, while other threads copy on.
// Piece i + ahead is not begun before ready(i + 1) has returned: until then it may lie in the same memory. What ready
// throws ends the copying. Throws std::invalid_argument if ahead < 2, with which nothing could follow the first piece.
void copy(int threads, const std::vector<Piece>& pieces, int64_t ahead, const std::function<void(int64_t)>& ready);

}  // namespace ktlib
