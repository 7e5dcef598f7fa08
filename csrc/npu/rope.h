// aclnn functions of rotary embeddings (spec/ascend-operators.md 4.5).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct InplacePartialRotaryMul {  // adjacent pairs of the channels of a slice, in fp32
  static constexpr const char* symbol = "aclnnInplacePartialRotaryMul";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  static constexpr int64_t kInterleaved = 1;  // mode
  Out x;
  In cos, sin;  // each value stands twice
  Int mode;
  Ints partial_slice;
  DSV4_ARGUMENTS(x, cos, sin, mode, partial_slice)
};

}  // namespace dsv4::npu
