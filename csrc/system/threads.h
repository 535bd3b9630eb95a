// Threads and scratch. OpenMP, because an extension loaded after torch shares torch's runtime and thread pool.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#ifdef KTLIB_STD_THREADS
#include <thread>
#else
#include <omp.h>
#endif

#include "system/interrupt.h"
#include "kernels/kernels.h"

namespace ktlib {

// `threads`, or 1 in a forked child of the process that loaded this: the threads of its pool, which is torch's too, do
// not exist here, and OpenMP would wait for them forever.
int threads_here(int threads);

// While this lives, the calling thread computes as processors do by default. torch.set_flush_denormal sets the mode of
// the thread that calls it alone, and of those it starts later: results would depend on which thread computed what.
class DefaultFloats {
 public:
  DefaultFloats() : before_(_mm_getcsr()) { set(kDefault); }
  ~DefaultFloats() { set(before_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  static constexpr unsigned kDefault = _MM_MASK_MASK, kFlags = _MM_EXCEPT_MASK;  // masked exceptions, to nearest

  // Flags of exceptions that happened are no mode; setting one is far slower than looking.
  static void set(unsigned mode) {
    if ((_mm_getcsr() & ~kFlags) != (mode & ~kFlags)) _mm_setcsr(mode);
  }

  const unsigned before_;
};

// body(thread) on every thread of a team, 0 being the calling one.
template <class Body>
void parallel_team(int threads, const Body& body) {
#ifdef KTLIB_STD_THREADS
  // For ThreadSanitizer, which cannot see the fork and join of GNU OpenMP, an uninstrumented library, and so reports
  // every region as a race.
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; thread++) team.emplace_back(body, thread);
  body(0);
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
#endif
}

// body(task, thread) for every task, taken in order by whichever thread is free. Each output element belongs to one
// task and no task depends on another's thread, so results do not depend on the number of threads. Throws Interrupted,
// with tasks left undone, if the call is to end.
template <class Body>
void parallel_tasks(const Kernels& k, int threads, int64_t count, const Body& body) {
  if (count == 0) return;
#ifdef KTLIB_STD_THREADS
  std::atomic<int64_t> next{0};  // relaxed: it hands out tasks and orders nothing, as OpenMP's own
  parallel_team(int(std::min<int64_t>(threads, count)), [&](int thread) {
    const DefaultFloats floats;
    if (k.thread_begin) k.thread_begin();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      if (!interrupted(k)) body(task, thread);
    if (k.thread_end) k.thread_end();
  });
#else
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    const DefaultFloats floats;
    if (k.thread_begin) k.thread_begin();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < count; task++)
      if (!interrupted(k)) body(task, omp_get_thread_num());
    if (k.thread_end) k.thread_end();
  }
#endif
  if (k.interruption && k.interruption->stopped()) throw Interrupted();
}

// The NUMA node of the CPU that the calling thread is on.
inline int numa_node() {
  unsigned node = 0;
  syscall(SYS_getcpu, nullptr, &node, nullptr);
  return int(node);
}

// The same where task i reads mostly part part_of(i) of weights whose parts lie on different NUMA nodes (system/memory.cpp,
// place_pages): threads take the tasks of their own node first and then help out with the others'.
template <class PartOf, class Body>
void parallel_tasks(const Kernels& k, int threads, int64_t count, int parts, const PartOf& part_of, const Body& body) {
  if (parts == 1) return parallel_tasks(k, threads, count, body);
  std::vector<std::vector<int64_t>> tasks(parts);
  for (int64_t task = 0; task < count; task++) tasks[part_of(task)].push_back(task);
  std::vector<std::atomic<int64_t>> next(parts);
  for (std::atomic<int64_t>& n : next) n = 0;
  parallel_tasks(k, threads, std::min<int64_t>(threads, count), [&](int64_t, int thread) {
    for (int i = 0; i < parts; i++) {
      const int part = (numa_node() + i) % parts;
      const int64_t size = int64_t(tasks[part].size());
      for (int64_t n; (n = next[part].fetch_add(1, std::memory_order_relaxed)) < size;)
        if (!interrupted(k)) body(tasks[part][n], thread);
    }
  });
}

// Readies fresh memory that many threads are about to fill. Asks for huge pages, 512 times fewer page faults, which
// otherwise cost more than the arithmetic that fills them; and has each page cleared by one thread, where threads that
// first touch the same huge page together would each clear one, and all but one throw theirs away: a fifth of a training
// step on 16 CPUs. Only hints to the operating system; changes no contents.
void populate(int threads, void* memory, int64_t bytes);

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};
using Piece = std::vector<Copy>;

// memcpy by many threads, one alone reaching a fraction of the memory's bandwidth, piece after piece: ready(i), on the
// calling thread, once piece i is complete, while others copy on. Piece i + ahead is not begun before ready(i + 1) has
// returned: until then it may lie in the same memory. What ready throws ends the copying. Throws
// std::invalid_argument if ahead < 2, with which nothing could follow the first piece.
void copy(int threads, const std::vector<Piece>& pieces, int64_t ahead, const std::function<void(int64_t)>& ready);

// Uninitialized memory for the duration of one call. Large blocks come from, and return to, a small process-wide store of
// raw memory: fresh pages must be cleared by the operating system, which took a quarter of a training step. Nothing is
// ever read from a block before it is written in the same call.
struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
};
// Moves the pages of [memory, memory + bytes) to a NUMA node and lets later ones come from there where it has room; pages
// at the edges go where most of them lies. Throws std::runtime_error if the operating system refuses.
void place_pages(void* memory, int64_t bytes, int node);

Block take_block(int64_t bytes, int threads);
void give_block(const Block& block);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  // threads: of the region that fills it.
  explicit Buffer(int64_t count, int threads = 1) {
    if (count > 0) block_ = take_block(count * int64_t(sizeof(T)), threads);
  }
  Buffer(Buffer&& other) noexcept { std::swap(block_, other.block_); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() {
    if (block_.memory) give_block(block_);
  }
  T* get() const { return static_cast<T*>(block_.memory); }
  T* operator+(int64_t offset) const { return get() + offset; }
  T& operator[](int64_t i) const { return get()[i]; }
  explicit operator bool() const { return block_.memory != nullptr; }

 private:
  Block block_;
};

// One slice of scratch per thread, slices a page apart from each other.
template <class T>
class ThreadBuffer {
#ifdef KTLIB_GUARD_PAGES
 public:
  ThreadBuffer(int threads, int64_t count) {
    for (int thread = 0; thread < threads; thread++) buffers_.emplace_back(count);
  }
  T* operator[](int thread) const { return buffers_[thread].get(); }

 private:
  std::vector<Buffer<T>> buffers_;
};
#else
 public:
  ThreadBuffer(int threads, int64_t count)
      : stride_(round_up(count, 4096 / sizeof(T)) + 4096 / sizeof(T)), buffer_(threads * stride_, threads) {}
  T* operator[](int thread) const { return buffer_ + thread * stride_; }

 private:
  int64_t stride_;
  Buffer<T> buffer_;
};
#endif

}  // namespace ktlib
