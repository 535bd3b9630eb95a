// Threads and scratch. OpenMP, because an extension loaded after torch shares torch's runtime and thread pool.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#ifdef KTLIB_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

#include "kernels.h"

namespace ktlib {

// body(task, thread) for every task, taken in order by whichever thread is free. Each output element belongs to one
// task and no task depends on another's thread, so results do not depend on the number of threads.
template <class Body>
void parallel_tasks(const Kernels& k, int threads, int64_t count, const Body& body) {
  if (count == 0) return;
#ifdef KTLIB_STD_THREADS
  // For ThreadSanitizer, which cannot see the fork and join of GNU OpenMP, an uninstrumented library, and so reports
  // every region as a race. The counter is relaxed: it hands out tasks and orders nothing, as OpenMP's own.
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    if (k.thread_begin) k.thread_begin();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task, thread);
    if (k.thread_end) k.thread_end();
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < std::min<int64_t>(threads, count); thread++) team.emplace_back(work, thread);
  work(0);
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    if (k.thread_begin) k.thread_begin();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < count; task++) body(task, omp_get_thread_num());
    if (k.thread_end) k.thread_end();
  }
#endif
}

// Asks for huge pages where [memory, memory + bytes) spans them: 512 times fewer page faults on first touch, which
// otherwise cost more than the arithmetic that fills the memory. Only a hint; changes no contents.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (uintptr_t(memory) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Uninitialized memory for the duration of one call. Large blocks come from, and return to, a small process-wide store of
// raw memory: fresh pages must be cleared by the operating system, which took a quarter of a training step. Nothing is
// ever read from a block before it is written in the same call.
struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
};
Block take_block(int64_t bytes);
void give_block(const Block& block);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count > 0) block_ = take_block(count * int64_t(sizeof(T)));
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
 public:
  ThreadBuffer(int threads, int64_t count)
      : stride_(round_up(count, 4096 / sizeof(T)) + 4096 / sizeof(T)), buffer_(threads * stride_) {}
  T* operator[](int thread) const { return buffer_ + thread * stride_; }

 private:
  int64_t stride_;
  Buffer<T> buffer_;
};

}  // namespace ktlib
