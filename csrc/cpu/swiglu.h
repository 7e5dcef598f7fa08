// Clamped SwiGLU, plain and quantised (spec/v4.md 5.2).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// weights[row] * silu(min(gate, limit)) * clamp(up, -limit, limit) in fp32, rounded once to gate's
// dtype.
struct Swiglu {
  DType dtype;
  const void* gate;
  RowLayout gate_rows;
  const void* up;
  RowLayout up_rows;
  const float* weights;  // null: all 1
  int64_t weights_stride;
  float limit;
  void* y;  // adjacent rows
};

// The same of bf16, then e4m3 codes and E8M0 scales of blocks of 128, in adjacent rows; no y.
struct SwigluQuant {
  Swiglu product;
  uint8_t* codes;
  uint8_t* scales;
};

constexpr int64_t kSwigluBlock = 128;

void swiglu(const Swiglu& call, Isa isa);
void swiglu_quant(const SwigluQuant& call, Isa isa);

}  // namespace dsv4::cpu
