// npu_quant_matmul: its operands; checked in fused_quant_matmul_check.cpp, computed in
// fused_quant_matmul.cpp.
#pragma once

#include "fused_quant.h"

namespace softnpu {

struct QuantMatmul {
  at::Tensor x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias;
  bool transpose1, transpose2;
  int64_t group;
  Out out;
  FIELDS(all, x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias, transpose1,
         transpose2, group, out)
  void check() const;
  void run() const;
};

}  // namespace softnpu
