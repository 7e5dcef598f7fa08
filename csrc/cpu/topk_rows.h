// Top-k over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// header of its comparison.

#include "cpu/offer_scores.h"

template <class X>
void offer_typed(const dsv4::cpu::TopK& call, int64_t row, int64_t visible,
                 dsv4::cpu::BestEntries& best) {
  offer(best, static_cast<const X*>(call.scores) + row * call.row_stride, visible, 0);
}

void offer_row(const dsv4::cpu::TopK& call, int64_t row, int64_t visible,
               dsv4::cpu::BestEntries& best) {
  DSV4_FOR_DTYPE(call.dtype, offer_typed, call, row, visible, best);
}
