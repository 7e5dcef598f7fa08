// The best entries of rows of scores (spec/v4.md 4.5, 15.1).
#pragma once

#include "common/dtype.h"
#include "common/indices.h"
#include "common/isa.h"
#include "cpu/best_entries.h"

namespace dsv4::cpu {

// best[row] = indices of the `chosen` best of the first visible[row] of n scores, best first, then
// -1. Strides in elements.
struct TopK {
  DType dtype;
  int64_t rows;
  int64_t n;
  const void* scores;
  int64_t row_stride;
  Indices visible;
  int64_t visible_stride;
  int64_t chosen;
  int32_t* best;  // [rows, chosen]
};

void topk(const TopK& call, Isa isa);

}  // namespace dsv4::cpu
