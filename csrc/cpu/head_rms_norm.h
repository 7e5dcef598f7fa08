// RMS normalisation of heads, rounded at every step (spec/v4.md 3.1).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// x * rsqrt(mean(x^2) + eps) of every row: the squares, their mean, its sum with eps, the root and
// the product each round to x's dtype. y: adjacent rows.
struct HeadRmsNorm {
  DType dtype;
  const void* x;
  RowLayout x_rows;
  float eps;
  void* y;
};

void head_rms_norm(const HeadRmsNorm& call, Isa isa);

}  // namespace dsv4::cpu
