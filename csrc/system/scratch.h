// Scratch: memory for the duration of one call.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace ktlib {

// Uninitialized memory. Large blocks come from, and return to, a small process-wide store of raw memory: fresh pages must
// be cleared by the operating system, which took a quarter of a training step. Nothing is ever read from a block before
// it is written in the same call.
struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
};

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
