// Ctrl-C during a long call: the thread that made it looks for signals now and then, between pieces of work. If one ends
// the call, all threads leave the rest of their work undone and the call throws; what it was writing must be forgotten.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>

#include "system/call.h"

namespace ktlib {

// Thrown on the calling thread, outside of parallel regions, once every thread has stopped.
struct Interrupted {};

class Interruption {
 public:
  // signalled: whether the call is to end; asked on this thread only, the first time after kInterval. It may run code of
  // the user, which may use this operator or the tile registers.
  explicit Interruption(bool (*signalled)()) : signalled_(signalled) {}

  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // stopped(), after looking for a signal if this is the calling thread and it is time. Costs a clock's reading.
  bool requested(const Kernels& k) {
    if (stopped() || !pthread_equal(pthread_self(), caller_)) return stopped();
    const auto now = Clock::now();
    if (now < next_) return false;
    stop_.store(signalled_(), std::memory_order_relaxed);
    if (k.thread_begin) k.thread_begin();
    next_ = Clock::now() + kInterval;
    return stopped();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{50};

  bool (*signalled_)();
  const pthread_t caller_ = pthread_self();
  Clock::time_point next_ = Clock::now() + kInterval;
  std::atomic<bool> stop_{false};
};

// For bodies of parallel_tasks (system/threads.h): whether to return, whatever is unfinished. A task of more than some
// milliseconds asks between its pieces, where no tile is in use.
inline bool interrupted(const Call& call) { return call.interruption && call.interruption->requested(call.kernels); }

}  // namespace ktlib
