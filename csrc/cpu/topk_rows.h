// Top-k over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// header of its comparison.

#include "cpu/offer_scores.h"

void offer_row(const dsv4::cpu::TopK& call, int64_t row, int64_t visible,
               dsv4::cpu::BestEntries& best) {
  const int64_t at = row * call.row_stride;
  switch (call.dtype) {
    case dsv4::DType::f32:
      return offer(best, static_cast<const float*>(call.scores) + at, visible, 0);
    case dsv4::DType::bf16:
      return offer(best, static_cast<const dsv4::BFloat16*>(call.scores) + at, visible, 0);
    case dsv4::DType::f16:
      return offer(best, static_cast<const dsv4::Half*>(call.scores) + at, visible, 0);
  }
}
