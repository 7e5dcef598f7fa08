// Expert dispatch and combination (spec/v4.md 5.3).
#pragma once

#include "common/dtype.h"
#include "common/indices.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// Each token's row once per chosen expert, sorted by expert, those of one expert in the order of
// (token, choice). Rows are bytes: of any dtype, adjacent in a token.
struct MoeDispatch {
  const char* x;
  int64_t row_bytes;
  int64_t x_stride_bytes;
  Indices ids;  // [tokens, choices]
  int64_t tokens;
  int64_t choices;
  int64_t ids_strides[2];
  int64_t experts;
  char* rows;
  int32_t* offsets;  // experts + 1
  int32_t* order;    // tokens * choices
};

// fp32 sums [rows / k, width] over each token's k rows of y in the order of its choices; row i
// belongs to choice order[i].
struct MoeCombine {
  DType dtype;
  const void* y;
  RowLayout y_rows;
  Indices order;
  int64_t order_stride;
  int64_t k;
  const int32_t* row_of;  // of every choice: moe_combine sets it
  float* sums;
};

void moe_dispatch(const MoeDispatch& call);
void moe_combine(MoeCombine call, Isa isa);

}  // namespace dsv4::cpu
