#include "system/copy.h"

#include <emmintrin.h>
#include <sched.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "system/threads.h"

namespace ktlib {
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

}  // namespace ktlib
