// RMS normalisation (spec/v4.md 3.1).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// y[row] = weight * x[row] / sqrt(mean(x[row]^2) + eps), in fp32 with one rounding to y's dtype,
// which is x's. x, y: rows of d elements; weight: d adjacent elements. The bits of a row depend on
// that row alone.
struct RmsNorm {
  DType dtype;
  const void* x;
  RowLayout x_rows;
  DType weight_dtype;
  const void* weight;
  float eps;
  void* y;
  RowLayout y_rows;
};

void rms_norm(const RmsNorm& call, Isa isa);

}  // namespace dsv4::cpu
