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

struct RmsNormDynamicQuant {  // the same, then int8 codes and one fp32 scale per row, of fp32
                              // values
  static constexpr const char* symbol = "aclnnRmsNormDynamicQuant";
  static constexpr std::array versions = {Version{Package::builtin, kA2 | kA3, {9, 1}}};
  static constexpr int64_t kInt8 = 2;  // dst_type
  static constexpr int64_t kWidest = 8192;
  In x, gamma;
  OptionalIn smooth_scales, beta;
  Real epsilon;
  Int dst_type;
  Out y, scale;
  DSV4_ARGUMENTS(x, gamma, smooth_scales, beta, epsilon, dst_type, y, scale)
};

struct RmsNormDynamicMxQuant {  // the same to MX-FP8 rows: one e8m0 scale per 32 channels, in pairs
  static constexpr const char* symbol = "aclnnRmsNormDynamicMxQuant";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kRoundedUp = 1;  // scale_alg
  static constexpr int64_t kE4m3 = 36;      // dst_type
  In x, gamma;
  OptionalIn beta;
  Real epsilon;
  Int scale_alg;
  Text round_mode;
  Int dst_type;
  Flag output_rstd;
  Out y, mxscale, rstd;
  DSV4_ARGUMENTS(x, gamma, beta, epsilon, scale_alg, round_mode, dst_type, output_rstd, y, mxscale,
                 rstd)
};

}  // namespace dsv4::npu
