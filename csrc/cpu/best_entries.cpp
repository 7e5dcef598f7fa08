#include "cpu/best_entries.h"

#include <algorithm>
#include <functional>

namespace dsv4::cpu {

constexpr int64_t kSpareEntries = 512;  // so that a small k is not selected again and again

void BestEntries::keep() {
  if (count > k) {
    std::nth_element(entries, entries + k - 1, entries + count, std::greater<>());
    count = k;
    bounded = true;
    threshold = score_of(entries[k - 1]);
  }
}

void BestEntries::indices(int32_t* to, bool in_order) {
  keep();
  if (in_order) {
    std::sort(entries, entries + count, std::greater<>());
  }
  std::transform(entries, entries + count, to, index_of);
  std::fill(to + count, to + k, -1);
}

int64_t best_entries_capacity(int64_t k, int64_t offered) {
  return std::min(2 * k, std::max(offered, k)) + kSpareEntries;
}

}  // namespace dsv4::cpu
