// What the operating system is told about memory pages: to have them ready, and on which NUMA node.
#pragma once

#include <cstdint>

namespace ktlib {

// Readies fresh memory that many threads are about to fill. Asks for huge pages, 512 times fewer page faults, which
// otherwise cost more than the arithmetic that fills them; and has each page cleared by one thread, where threads that
// first touch the same huge page together would each clear one, and all but one throw theirs away: a fifth of a training
// step on 16 CPUs. Only hints to the operating system; changes no contents.
void populate(int threads, void* memory, int64_t bytes);

// Moves the pages of [memory, memory + bytes) to a NUMA node and lets later ones come from there where it has room; pages
// at the edges go where most of them lies. Throws std::runtime_error if the operating system refuses.
void place_pages(void* memory, int64_t bytes, int node);

}  // namespace ktlib
