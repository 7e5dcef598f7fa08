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

// Calls run(rows of an expert, its first panel, how many) for panels begin .. end-1 of all listed
// experts, `panels` each: up to `most` of one expert at a time.
template <class Run>
void each_stripe(const ExpertRows* experts, int64_t panels, int64_t most, int64_t begin,
                 int64_t end, const Run& run) {
  while (begin < end) {
    const int64_t panel = begin % panels;
    const int64_t some = std::min({most, panels - panel, end - begin});
    run(experts[begin / panels], panel, some);
    begin += some;
  }
}

}  // namespace dsv4::cpu
