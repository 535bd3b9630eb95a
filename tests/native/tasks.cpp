// parallel_tasks under ThreadSanitizer. `tasks apart`: every task writes its own element. `tasks shared`: all of them
// write one, a race that must be reported, or the sanitizer build proves nothing.
// Each is long enough for every thread to get some.
#include <cstdio>
#include <cstring>
#include <vector>

#include "system/threads.h"

int main(int, char** arguments) {
  const bool shared = !std::strcmp(arguments[1], "shared");
  constexpr int64_t kTasks = 1000;
  std::vector<int64_t> totals(kTasks);
  const ktlib::Kernels plain{};
  ktlib::parallel_tasks({plain, 4}, kTasks, [&](int64_t task, int) {
    for (int i = 0; i < 5000; i++) totals[shared ? 0 : task] += task;
  });
  int64_t sum = 0;
  for (int64_t total : totals) sum += total;
  std::printf("%s: %lld\n", arguments[1], static_cast<long long>(sum));
}
