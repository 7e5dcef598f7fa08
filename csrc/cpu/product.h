// Matrix products of activations with stored weights (spec/v4.md 6.3): y = x W^T, dense or by
// expert.
//
// The order of sums is fixed and is that of AMX (docs/cpu-kernels.md): from 32 channels to 32, two
// chains of 16 fused multiply-adds from zero over the even and the odd channels, their sum, then
// the running sum; subnormals of operands and results are 0. So a row's bits depend on that row and
// the weight alone, whatever else is in the batch, on any number of threads and in every
// instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dsv4::cpu {

enum class Stored : uint8_t { f32, bf16, f16, e4m3, e2m1 };

// The matrices [n, k] of E experts, as a checkpoint stores them; strides in stored elements, of
// which one holds two e2m1 codes.
struct StoredWeight {
  Stored format;
  int64_t element_bytes;
  const void* codes;
  int64_t expert_stride;
  int64_t row_stride;
  // E8M0, of quantised formats: of 128 x 128 weights (e4m3), or of 32 channels of a row (e2m1).
  const uint8_t* scale = nullptr;
  int64_t scale_expert_stride = 0;
  int64_t scale_row_stride = 0;
  int64_t scale_block_stride = 0;
};

// Rows [count, k]: floats, or e4m3 with an E8M0 scale per 128 channels.
struct Activations {
  Stored format;
  const void* values;
  int64_t row_stride;
  const uint8_t* scale = nullptr;
  int64_t scale_row_stride = 0;
  int64_t scale_block_stride = 0;
};

// y[row] = x[row] W[e]^T with one rounding from fp32 to y's dtype; e is the expert of the row:
// offsets[e] <= row < offsets[e + 1]. Rows of no expert are 0; of offsets that do not rise from 0
// to the number of rows, no row outside and none twice is read or written.
struct Product {
  int64_t rows;
  int64_t n;
  int64_t k;
  Activations x;
  StoredWeight weight;
  const int32_t* offsets;
  int64_t experts;
  DType dtype;
  void* y;
  int64_t y_row_stride;
};

void product(const Product& call, Isa isa);

}  // namespace dsv4::cpu
