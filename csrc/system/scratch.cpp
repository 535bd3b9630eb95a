#include "system/scratch.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "system/pages.h"

namespace ktlib {

#ifdef KTLIB_GUARD_PAGES
// For tests: a mapping for every block, which ends right before a page that may not be touched, or, every third time,
// begins right after one. Processor instructions that no sanitizer sees, such as tile loads and stores, fault there too.
// What is left of its pages must keep its contents; and memory that was not written is NaN.
namespace {

constexpr int64_t kGuard = 4096;
constexpr unsigned char kUntouched = 0xff;

struct Mapping {
  unsigned char *begin, *end;  // of the accessible pages
};

Mapping mapping(const Block& block) {
  unsigned char* memory = static_cast<unsigned char*>(block.memory);
  unsigned char* begin = memory - uintptr_t(memory) % kGuard;
  return {begin, begin + round_up(memory - begin + block.bytes, kGuard)};
}

}  // namespace

Block take_block(int64_t bytes, int) {
  static std::atomic<unsigned> blocks{0};
  const int64_t size = round_up(bytes, kGuard);
  void* memory = mmap(nullptr, size_t(size + 2 * kGuard), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  unsigned char* begin = static_cast<unsigned char*>(memory) + kGuard;
  mprotect(begin, size_t(size), PROT_READ | PROT_WRITE);
  std::memset(begin, kUntouched, size_t(size));
  return {blocks++ % 3 == 0 ? begin : begin + size - bytes, bytes};
}

void give_block(const Block& block) {
  const Mapping pages = mapping(block);
  unsigned char *first = static_cast<unsigned char*>(block.memory), *last = first + block.bytes;
  for (unsigned char* byte = pages.begin; byte < pages.end; byte++)
    if ((byte < first || byte >= last) && *byte != kUntouched) std::abort();
  munmap(pages.begin - kGuard, size_t(pages.end - pages.begin + 2 * kGuard));
}
#else
namespace {

constexpr int64_t kPooled = int64_t(2) << 20;        // smaller blocks are malloc's business
constexpr int64_t kStoreLimit = int64_t(512) << 20;  // bytes that stay between calls, at most

struct Store {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  int64_t bytes = 0;

  Block remove(size_t index) {
    const Block block = blocks[index];
    blocks.erase(blocks.begin() + int64_t(index));
    bytes -= block.bytes;
    return block;
  }
};

// Never destroyed: a daemon thread may still compute while the process exits.
Store& store() {
  static Store* instance = new Store;
  return *instance;
}

Block allocate(int64_t bytes, int64_t align, int threads) {
  const int64_t size = round_up(bytes, align);
  void* memory = std::aligned_alloc(size_t(align), size_t(size));
  if (!memory) throw std::bad_alloc();
  populate(threads, memory, size);
  return {memory, size};
}

}  // namespace

Block take_block(int64_t bytes, int threads) {
  if (bytes < kPooled) return allocate(bytes, 64, 1);
  {
    // try_lock: after a fork the lock may be held forever by a thread that does not exist here.
    std::unique_lock<std::mutex> lock(store().mutex, std::try_to_lock);
    if (lock) {  // the smallest that fits and is not far too large
      const std::vector<Block>& blocks = store().blocks;
      size_t best = blocks.size();
      for (size_t i = 0; i < blocks.size(); i++)
        if (blocks[i].bytes >= bytes && blocks[i].bytes / 2 <= bytes &&
            (best == blocks.size() || blocks[i].bytes < blocks[best].bytes))
          best = i;
      if (best < blocks.size()) return store().remove(best);
    }
  }
  return allocate(bytes, kPooled, threads);
}

void give_block(const Block& block) {
  if (block.bytes >= kPooled && block.bytes <= kStoreLimit) {
    std::unique_lock<std::mutex> lock(store().mutex, std::try_to_lock);
    if (lock) {
      // The oldest make room: they are of sizes no longer in use.
      while (store().bytes + block.bytes > kStoreLimit) std::free(store().remove(0).memory);
      store().blocks.push_back(block);
      store().bytes += block.bytes;
      return;
    }
  }
  std::free(block.memory);
}
#endif

}  // namespace ktlib
