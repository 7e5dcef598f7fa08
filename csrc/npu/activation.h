// aclnn functions of the clamped SwiGLU (spec/ascend-operators.md 4.14).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct ClippedSwiglu {  // halves of x: silu(min(gate, limit)) * clamp(up, -limit, limit)
  static constexpr const char* symbol = "aclnnClippedSwiglu";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  In x;
  OptionalIn group_index;
  Int dim;
  Real alpha, limit, bias;
  Flag interleaved;
  Out out;
  DSV4_ARGUMENTS(x, group_index, dim, alpha, limit, bias, interleaved, out)
};

}  // namespace dsv4::npu
