// Products of int8 rows with int8 weights, dense or by expert (spec/v4.md 5.2, 6.3): exact int32
// sums, then a scale per channel and one per row.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dsv4::cpu {

// Rows [count, k] of codes; scales fp32 [count].
struct Int8Rows {
  const int8_t* codes;
  int64_t row_stride;
  const int32_t* source;  // which row of codes each is; null: its own
  const float* scale;
  int64_t scale_stride;
};

// Matrices [n, k] of E experts; scales [n] each, of fp32 or of another dtype that fp32 holds.
struct Int8Weight {
  const int8_t* codes;
  int64_t expert_stride;
  int64_t row_stride;
  DType scale_dtype;
  const void* scale;
  int64_t scale_expert_stride;
  int64_t scale_stride;
};

// Adjacent rows y[row] = x[row] W[e]^T of the row's expert, offsets[e] <= row < offsets[e + 1]:
// int32 sums, or bf16 of the sum as fp32, times the channel's scale, times the row's. Rows of no
// expert are 0; of offsets that do not rise from 0 to the number of rows, no row outside and none
// twice is read or written. Sums of k below 2^17 are exact; above they wrap around.
struct Int8Product {
  int64_t rows;
  int64_t n;
  int64_t k;
  Int8Rows x;
  Int8Weight weight;
  const int32_t* offsets;
  int64_t experts;
  int32_t* sums;  // or null, then
  BFloat16* scaled;
};

void int8_product(const Int8Product& call, Isa isa);

}  // namespace dsv4::cpu
