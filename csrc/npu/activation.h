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

struct DequantSwigluQuant {  // integer sums of gate and up to int8 rows with one scale each
  static constexpr const char* symbol = "aclnnDequantSwigluQuantV2";
  static constexpr std::array versions = {Version{Package::builtin, kA2 | kA3, {9, 1}}};
  static constexpr int64_t kInt8 = 2;           // dst_type
  static constexpr int64_t kLastAxis = -1;      // activate_dim
  static constexpr int64_t kClampedHalves = 2;  // swiglu_mode
  In x;
  OptionalIn weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index;
  Flag activate_left;
  Text quant_mode;
  Int dst_type;
  Text round_mode;
  Int activate_dim, swiglu_mode;
  Real clamp_limit, glu_alpha, glu_bias;
  Out y, scale;
  DSV4_ARGUMENTS(x, weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index,
                 activate_left, quant_mode, dst_type, round_mode, activate_dim, swiglu_mode,
                 clamp_limit, glu_alpha, glu_bias, y, scale)
};

struct SwigluGroupQuant {  // halves of x to MX-FP8 rows, quantised straight from fp32
  static constexpr const char* symbol = "aclnnSwigluGroupQuant";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kMx = 1;  // quant_mode
  In x;
  OptionalIn weight, group_index, inv_scale;
  Int dst_type, quant_mode, block_size;
  Flag round_scale;
  Real clamp_limit, dst_type_max;
  Flag output_origin;
  Out y, y_scale, y_origin;
  DSV4_ARGUMENTS(x, weight, group_index, inv_scale, dst_type, quant_mode, block_size, round_scale,
                 clamp_limit, dst_type_max, output_origin, y, y_scale, y_origin)
};

}  // namespace dsv4::npu
