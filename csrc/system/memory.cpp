#include <emmintrin.h>
#include <linux/mempolicy.h>
#include <sched.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "system/threads.h"

namespace ktlib {

void populate(int threads, void* memory, int64_t bytes) {
  constexpr int64_t kHuge = int64_t(2) << 20;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, refused before Linux 5.14 and without consequence
  constexpr Kernels kPlain{};
  const uintptr_t begin = round_up(uintptr_t(memory), kHuge);  // pages at the edges may be in use already
  const int64_t pages = (int64_t(uintptr_t(memory)) + bytes - int64_t(begin)) / kHuge;
  if (pages <= 0) return;
  madvise(reinterpret_cast<void*>(begin), size_t(pages * kHuge), MADV_HUGEPAGE);
  if (threads == 1) return;
  parallel_tasks(kPlain, threads, pages, [&](int64_t page, int) {
    madvise(reinterpret_cast<void*>(begin + uintptr_t(page * kHuge)), size_t(kHuge), kPopulateWrite);
  });
}

namespace {

// Waits a little, longer if it has often; returns how often it has.
int pause(int waits) {
  constexpr int kBusy = 64, kYielding = 256;
  if (waits < kBusy)
    _mm_pause();
  else if (waits < kYielding)
    sched_yield();
  else
    usleep(20);
  return waits + 1;
}

}  // namespace

void copy(int threads, const std::vector<Piece>& pieces, int64_t ahead, const std::function<void(int64_t)>& ready) {
  constexpr int64_t kBlock = int64_t(256) << 10;
  if (ahead < 2) throw std::invalid_argument("ahead: got " + std::to_string(ahead) + ", needs at least 2");
  const int64_t count = int64_t(pieces.size());
  std::vector<std::pair<int64_t, Copy>> blocks;  // in the order of their pieces
  std::vector<std::atomic<int64_t>> left(count);
  for (int64_t i = 0; i < count; i++) {
    for (const Copy& whole : pieces[i])
      for (int64_t first = 0; first < whole.bytes; first += kBlock) {
        char* const to = static_cast<char*>(whole.to) + first;
        const char* const from = static_cast<const char*>(whole.from) + first;
        blocks.push_back({i, {to, from, std::min(kBlock, whole.bytes - first)}});
        left[i].fetch_add(1, std::memory_order_relaxed);
      }
  }
  std::atomic<int64_t> next{0}, allowed{ahead};
  std::atomic<bool> stopped{false};
  std::exception_ptr error;
  const auto all_begun = [&] { return next.load(std::memory_order_relaxed) >= int64_t(blocks.size()); };
  const auto copy_one = [&] {  // false if none may be begun
    int64_t n = next.load(std::memory_order_relaxed);
    do {
      if (n >= int64_t(blocks.size()) || blocks[n].first >= allowed.load(std::memory_order_acquire)) return false;
    } while (!next.compare_exchange_weak(n, n + 1, std::memory_order_relaxed));
    const auto& [piece, block] = blocks[n];
    std::memcpy(block.to, block.from, size_t(block.bytes));
    left[piece].fetch_sub(1, std::memory_order_release);
    return true;
  };
  const int64_t useful = std::max<int64_t>(1, int64_t(blocks.size()));
  parallel_team(int(std::min<int64_t>(threads_here(threads), useful)), [&](int thread) {
    int waits = 0;
    if (thread != 0)
      while (!stopped.load(std::memory_order_relaxed) && !all_begun()) waits = copy_one() ? 0 : pause(waits);
    for (int64_t i = 0; thread == 0 && i < count; i++) {
      while (left[i].load(std::memory_order_acquire) > 0) waits = copy_one() ? 0 : pause(waits);
      try {
        ready(i);
      } catch (...) {
        error = std::current_exception();
        stopped = true;
        break;
      }
      allowed.store(i + ahead, std::memory_order_release);
    }
  });
  if (error) std::rethrow_exception(error);
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

namespace {

const pid_t process_of_pool = getpid();

}  // namespace

int threads_here(int threads) { return getpid() == process_of_pool ? threads : 1; }

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
constexpr int64_t kStoreLimit = int64_t(512) << 20;  // bytes kept between calls, at most

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
