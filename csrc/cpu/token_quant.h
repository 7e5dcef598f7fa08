// Rows of codes with one fp32 scale each (spec/deployments.md 1).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

enum class TokenFormat { int8, e4m3 };

// scale[row] = largest magnitude / the format's largest value, NaN of a row that is not finite;
// codes of x / scale, rounded to nearest even. x, codes and scales: adjacent rows but x. With a
// weight [width] of x's dtype: of the row's RMS norm in fp32 (spec/v4.md 3.1).
struct TokenQuant {
  TokenFormat format;
  DType dtype;
  const void* x;
  RowLayout x_rows;
  const void* weight;  // or null
  float eps;
  uint8_t* codes;
  float* scales;
};

void token_quant(const TokenQuant& call, Isa isa);

}  // namespace dsv4::cpu
