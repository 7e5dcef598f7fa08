// Routed experts and the shared expert in int8 (spec/deployments.md 2, 4, spec/v4.md 5.2, 5.3).
#pragma once

#include "common/dtype.h"
#include "common/indices.h"
#include "common/isa.h"
#include "common/row_layout.h"
#include "cpu/int8_product.h"

namespace dsv4::cpu {

// w13 [2 * width, channels] with fp32 scales adjacent in an expert, w2 [channels, width].
struct Int8Expert {
  Int8Weight w13;
  Int8Weight w2;
};

// y = the shared expert of x, then each choice's expert times its weight, added in fp32 in the
// order of choices and rounded once. x: bf16 [tokens, channels]; y: adjacent rows.
struct Int8Moe {
  const BFloat16* x;
  RowLayout x_rows;
  int64_t choices;
  const float* weights;
  int64_t weights_strides[2];
  Indices ids;
  int64_t ids_strides[2];
  int64_t experts;
  int64_t width;
  Int8Expert routed;
  Int8Expert shared;
  float limit;
  BFloat16* y;
};

void int8_moe(const Int8Moe& call, Isa isa);

}  // namespace dsv4::cpu
