// Partial interleaved rotary embedding (spec/v4.md 3.3).
#pragma once

#include "common/dtype.h"
#include "common/indices.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// Rotates the adjacent pairs of the last `width` channels of every row in place. Each of the
// `tokens` tokens has as many rows as the others and one row of cosines and sines, `width` adjacent
// values each (even), the value of a pair at both of its places.
struct ApplyRope {
  DType dtype;
  void* x;
  RowLayout x_rows;
  int64_t tokens;
  int64_t width;
  const float* cos;
  int64_t cos_stride;
  const float* sin;
  int64_t sin_stride;
};

// Copies of rows of x, rotated by positions[token] * inv_freq[pair], or minus that. y: adjacent
// rows.
struct Rope {
  DType dtype;
  const void* x;
  RowLayout x_rows;
  int64_t tokens;
  int64_t pairs;
  Indices positions;
  int64_t position_stride;
  const float* inv_freq;
  int64_t inv_freq_stride;
  bool inverse;
  void* y;
};

void apply_rope(const ApplyRope& call, Isa isa);
void rope(const Rope& call, Isa isa);

}  // namespace dsv4::cpu
