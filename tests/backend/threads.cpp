// Parallelism for ThreadSanitizer, which does not know OpenMP's: a thread of its own for each of
// four ranges, however short they are.
#include "common/threads.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace dsv4 {

void parallel_for(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t part = std::max<int64_t>(1, (count + 3) / 4);
  std::vector<std::jthread> threads;
  for (int64_t begin = 0; begin < count; begin += part) {
    threads.emplace_back([&, begin] { body(begin, std::min(count, begin + part)); });
  }
}

}  // namespace dsv4
