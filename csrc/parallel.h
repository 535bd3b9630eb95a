// Threads and scratch. OpenMP, because an extension loaded after torch shares torch's runtime and thread pool.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace ktlib {

// body(task, thread) for every task, taken in order by whichever thread is free. Each output element belongs to one
// task and no task depends on another's thread, so results do not depend on the number of threads.
template <class Body>
void parallel_tasks(const Kernels& k, int threads, int64_t count, const Body& body) {
  if (count == 0) return;
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    if (k.thread_begin) k.thread_begin();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < count; task++) body(task, omp_get_thread_num());
    if (k.thread_end) k.thread_end();
  }
}

// Uninitialized memory for the duration of one call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count <= 0) return;
    constexpr size_t kHuge = size_t(2) << 20;
    const size_t bytes = size_t(count) * sizeof(T);
    const size_t align = bytes >= 2 * kHuge ? kHuge : 64;
    void* memory = std::aligned_alloc(align, size_t(round_up(int64_t(bytes), int64_t(align))));
    if (!memory) throw std::bad_alloc();
    if (align == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);  // fewer page faults; only a hint
    data_.reset(static_cast<T*>(memory));
  }
  T* get() const { return data_.get(); }
  T* operator+(int64_t offset) const { return data_.get() + offset; }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  explicit operator bool() const { return bool(data_); }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data_;
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
