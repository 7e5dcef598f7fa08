// Expert routing by score and by token hash (spec/v4.md 5.1).
#pragma once

#include "common/dtype.h"
#include "common/indices.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// Scores sqrt(softplus(unit * (x . weight))) of every expert in fp32; the `k` experts with the
// largest score + bias * bias_unit, or those that the table gives to the token's id; their scores
// over their sum, times route_scale. Results are contiguous [T, k].
struct Gate {
  DType dtype;
  const void* x;
  RowLayout x_rows;
  DType weight_dtype;
  const void* weight;
  int64_t experts;
  int64_t weight_stride;
  float unit;
  int64_t k;
  float route_scale;
  // By score:
  const float* bias;  // null: by table
  int64_t bias_stride;
  float bias_unit;
  // By table:
  Indices tokens;
  int64_t tokens_stride;
  Indices table;
  int64_t table_rows;
  int64_t table_strides[2];
  float* weights;
  int32_t* ids;
};

void gate(const Gate& call, Isa isa);

// Experts and weights of a token from its logits, which become scores.
void route(const Gate& call, int64_t token, float* logits);

}  // namespace dsv4::cpu
