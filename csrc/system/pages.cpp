#include "system/pages.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "system/threads.h"

namespace ktlib {

void populate(int threads, void* memory, int64_t bytes) {
  constexpr int64_t kHuge = int64_t(2) << 20;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, refused before Linux 5.14 and without consequence
  const Kernels plain{};
  const uintptr_t begin = round_up(uintptr_t(memory), kHuge);  // pages at the edges may be in use already
  const int64_t pages = (int64_t(uintptr_t(memory)) + bytes - int64_t(begin)) / kHuge;
  if (pages <= 0) return;
  madvise(reinterpret_cast<void*>(begin), size_t(pages * kHuge), MADV_HUGEPAGE);
  if (threads == 1) return;
  parallel_tasks({plain, threads}, pages, [&](int64_t page, int) {
    madvise(reinterpret_cast<void*>(begin + uintptr_t(page * kHuge)), size_t(kHuge), kPopulateWrite);
  });
}

void place_pages(void* memory, int64_t bytes, int node) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (uintptr_t(memory) + kPage / 2) / kPage * kPage;
  const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes) + kPage / 2) / kPage * kPage;
  constexpr int kBits = 8 * sizeof(unsigned long), kNodes = 1024;
  unsigned long mask[kNodes / kBits] = {};
  mask[node / kBits] = 1ul << node % kBits;
  if (begin < end && syscall(SYS_mbind, begin, end - begin, MPOL_PREFERRED, mask, kNodes, MPOL_MF_MOVE) != 0)
    throw std::runtime_error("NUMA node " + std::to_string(node) + ": " + std::strerror(errno));
}

}  // namespace ktlib
