// Which rows an expert has: offsets[e] to offsets[e + 1], of offsets that may hold anything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dsv4::cpu {

struct ExpertRows {
  int64_t expert, begin, end;
};

// This thread's list of the experts that have rows, in rising order of both, valid until the thread
// asks again. Of offsets that do not rise from 0 to the number of rows, no row outside is listed
// and none twice. clear(begin, end) is called for the rows that no expert has.
template <class Clear>
const std::vector<ExpertRows>& rows_by_expert(const int32_t* offsets, int64_t experts, int64_t rows,
                                              const Clear& clear) {
  static thread_local std::vector<ExpertRows> found;
  found.clear();
  int64_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = std::clamp<int64_t>(offsets[e], next, rows);
    const int64_t end = std::clamp<int64_t>(offsets[e + 1], begin, rows);
    if (end > begin) {
      clear(next, begin);
      found.push_back({e, begin, end});
      next = end;
    }
  }
  clear(next, rows);
  return found;
}

}  // namespace dsv4::cpu
