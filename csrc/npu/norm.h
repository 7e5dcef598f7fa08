// aclnn functions of normalisation (spec/ascend-operators.md 4.4).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct RmsNorm {  // y = gamma * x / sqrt(mean(x^2) + eps) over gamma's axes; rstd fp32, 1 where
                  // gamma has its axes
  static constexpr const char* symbol = "aclnnRmsNorm";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
  In x, gamma;
  Real epsilon;
  Out y, rstd;
  DSV4_ARGUMENTS(x, gamma, epsilon, y, rstd)
};

}  // namespace dsv4::npu
