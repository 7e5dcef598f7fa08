// Integer sums of an expert's w1 and w3 to the int8 input of its w2 (spec/deployments.md 4).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dsv4::cpu {

// g and u, the halves of sums [rows, 2 * width], times the channel's scale of the row's expert and
// the row's; silu(min(g, limit)) * clamp(u, -limit, limit) in fp32; codes with one scale per row.
// Codes and scales of rows of no expert are 0; of offsets that do not rise from 0 to the number of
// rows, no row outside and none twice is read or written.
struct Int8SwigluQuant {
  int64_t rows;
  int64_t width;
  const int32_t* sums;
  int64_t sums_stride;
  const float* weight_scale;  // [experts, 2 * width], adjacent in an expert
  int64_t weight_scale_stride;
  const float* x_scale;
  int64_t x_scale_stride;
  const int32_t* offsets;
  int64_t experts;
  float limit;
  int8_t* codes;  // adjacent rows
  float* scales;
};

void int8_swiglu_quant(const Int8SwigluQuant& call, Isa isa);

}  // namespace dsv4::cpu
