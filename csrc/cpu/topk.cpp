#include "cpu/topk.h"

#include <algorithm>

#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/topk_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

int64_t visible_of(const TopK& call, int64_t row) {
  return std::clamp(call.visible.at(row * call.visible_stride), int64_t{0}, call.n);
}

}  // namespace

void topk(const TopK& call, Isa isa) {
  if (call.chosen == 0) {
    return;
  }
  const auto offer = DSV4_FOR_ISA(isa, offer_row);
  const int64_t capacity = best_entries_capacity(call.chosen, call.n);
  parallel_for(call.rows, grain_of(kElementsPerThread, call.n), [&](int64_t begin, int64_t end) {
    thread_local ThreadBuffer buffer;
    for (int64_t row = begin; row < end; ++row) {
      BestEntries best{buffer.of<uint64_t>(capacity), capacity, call.chosen};
      offer(call, row, visible_of(call, row), best);
      best.indices(call.best + row * call.chosen, true);
    }
  });
}

}  // namespace dsv4::cpu
