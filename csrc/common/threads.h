// Parallelism without torch: whoever links the kernels provides it (csrc/bind/threads.cpp: torch's
// own threads).
#pragma once

#include <cstdint>
#include <functional>

namespace dsv4 {

// Calls body(begin, end) over disjoint ranges that cover 0..count-1, each of at least `grain` but
// the last, and returns when all are done. Which thread runs which range is not specified: no
// result may depend on it.
void parallel_for(int64_t count, int64_t grain,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace dsv4
