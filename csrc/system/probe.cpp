#include "system/probe.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "system/scratch.h"
#include "system/threads.h"

namespace ktlib {

double peak_rate(const Kernels& k, int threads, int repeats) {
  if (!k.burn) return 0.0;
  threads = threads_here(threads);
  double best = 0.0;
  for (int repeat = 0; repeat < repeats; repeat++) {
    int64_t operations = 0;
    double seconds = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : operations) reduction(max : seconds)
    {
      if (k.thread_begin) k.thread_begin();
      operations += k.burn(1000);
#pragma omp barrier
      const double start = omp_get_wtime();
      operations = k.burn(200000);
      seconds = omp_get_wtime() - start;
      if (k.thread_end) k.thread_end();
    }
    best = std::max(best, double(operations) / seconds);
  }
  return best;
}

double read_rate(int threads, int64_t bytes, int repeats) {
  threads = threads_here(threads);
  const int64_t count = bytes / int64_t(sizeof(uint64_t));
  const Buffer<uint64_t> memory(count);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) memory[i] = uint64_t(i);
  double best = 0.0;
  volatile uint64_t sink = 0;
  for (int repeat = 0; repeat < repeats; repeat++) {
    uint64_t sum = 0;
    const double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : sum)
    for (int64_t i = 0; i < count; i++) sum ^= memory[i];
    best = std::max(best, double(count * int64_t(sizeof(uint64_t))) / (omp_get_wtime() - start));
    sink = sink + sum;
  }
  return best;
}

}  // namespace ktlib
