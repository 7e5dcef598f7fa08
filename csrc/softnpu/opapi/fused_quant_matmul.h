// Quantised products: what their two faces, rows and columns or the NZ format, share.
#pragma once

#include "fused_quant.h"

namespace softnpu::quant_matmul {

// kVector: T-C, T-T, K-C and K-T (scales of rank 1); kBlock: G-B and B-B; kMx; kGroup: K-G.
enum class Mode { kVector, kBlock, kMx, kGroup };

struct Form {
  unsigned where;
  Mode mode;
  Types x1, x2, x1_scale, x2_scale, x2_offset, bias, out;
};

struct Operands {
  at::Tensor x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias;
  bool transpose1, transpose2;
  int64_t group;
  Out out;
  bool nz = false;  // x2 came in the NZ format
  FIELDS(all, x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias, transpose1,
         transpose2, group, out)
  void check() const;
  void run() const;
};

// The row of the tables whose every column holds what was given; otherwise names the first column
// that no row is left for.
const Form& match(const Operands& call);

}  // namespace softnpu::quant_matmul
