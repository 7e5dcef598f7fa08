// How kernels over rows share their work among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/threads.h"

namespace dsv4::cpu {

// Below, waking a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;    // that are read
constexpr int64_t kProductsPerThread = 1 << 18;  // multiply-adds

// How many units a thread takes at least, each with `of_one` of what it needs `least` of.
inline int64_t grain_of(int64_t least, int64_t of_one) {
  return std::max<int64_t>(1, least / std::max<int64_t>(1, of_one));
}

// run(call, begin, end) over all of `count` rows, each with about `elements` to read.
template <class Call>
void parallel_rows(const Call& call, int64_t count, int64_t elements,
                   void (*run)(const Call&, int64_t, int64_t)) {
  const int64_t grain = grain_of(kElementsPerThread, elements);
  if (count <= grain) {
    if (count > 0) {
      run(call, 0, count);
    }
    return;
  }
  parallel_for(count, grain, [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

}  // namespace dsv4::cpu
