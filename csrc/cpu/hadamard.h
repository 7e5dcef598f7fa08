// Hadamard rotation (spec/v4.md 4.5).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// H_n x / sqrt(n) of every row of n elements, n a power of two, in fp32 with one rounding. y:
// adjacent rows.
struct Hadamard {
  DType dtype;
  const void* x;
  RowLayout x_rows;
  void* y;
  bool scaled = true;  // false: without the factor 1 / sqrt(n)
};

void hadamard(const Hadamard& call, Isa isa);

}  // namespace dsv4::cpu
