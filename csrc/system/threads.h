// Threads. OpenMP, because an extension loaded after torch shares torch's runtime and thread pool.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#ifdef KTLIB_STD_THREADS
#include <thread>
#else
#include <omp.h>
#endif

#include "system/call.h"
#include "system/interrupt.h"

namespace ktlib {

// `threads`, or 1 in a forked child of the process that loaded this: the threads of its pool, which is torch's too, do
// not exist here, and OpenMP would wait for them forever.
inline const pid_t loaded_by = getpid();
inline int threads_here(int threads) { return getpid() == loaded_by ? threads : 1; }

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
void parallel_tasks(const Call& call, int64_t count, const Body& body) {
  if (count == 0) return;
  const Kernels& k = call.kernels;
  const int threads = int(std::min<int64_t>(call.threads, count));
#ifdef KTLIB_STD_THREADS
  std::atomic<int64_t> next{0};  // relaxed: it hands out tasks and orders nothing, as OpenMP's own
  parallel_team(threads, [&](int thread) {
    const DefaultFloats floats;
    if (k.thread_begin) k.thread_begin();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      if (!interrupted(call)) body(task, thread);
    if (k.thread_end) k.thread_end();
  });
#else
#pragma omp parallel num_threads(threads)
  {
    const DefaultFloats floats;
    if (k.thread_begin) k.thread_begin();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < count; task++)
      if (!interrupted(call)) body(task, omp_get_thread_num());
    if (k.thread_end) k.thread_end();
  }
#endif
  if (call.interruption && call.interruption->stopped()) throw Interrupted();
}

// The NUMA node of the CPU that the calling thread is on.
inline int numa_node() {
  unsigned node = 0;
  syscall(SYS_getcpu, nullptr, &node, nullptr);
  return int(node);
}

}  // namespace ktlib
