// aclnn functions that quantise activations (spec/ascend-operators.md 4.6).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct DynamicQuant {  // int8 codes and one fp32 scale per row
  static constexpr const char* symbol = "aclnnDynamicQuantV2";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
  In x;
  OptionalIn smooth_scales, group_index;
  DataType dst_type;
  Out y, scale;
  OptionalOut offset;
  DSV4_ARGUMENTS(x, smooth_scales, group_index, dst_type, y, scale, offset)
};

// Each piece of a row times one small matrix, rounded to x's dtype; int8 codes and one fp32 scale
// per row of that.
struct RotateQuant {
  static constexpr const char* symbol = "aclnnRotateQuant";
  static constexpr std::array versions = {Version{Package::builtin, kA2 | kA3, {9, 1}}};
  static constexpr int64_t kLastAxis = -1;
  static constexpr int64_t kAmax = 0;  // scale_alg
  In x, rotation;
  OptionalIn alpha;
  Int axis;
  Text round_mode;
  Int scale_alg;
  Real dst_type_max;
  Flag trans;
  Out y, scale;
  DSV4_ARGUMENTS(x, rotation, alpha, axis, round_mode, scale_alg, dst_type_max, trans, y, scale)
};

struct DynamicMxQuant {  // e4m3 codes and one e8m0 scale per 32 channels, in pairs
  static constexpr const char* symbol = "aclnnDynamicMxQuantV3";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kLastAxis = -1;
  static constexpr int64_t kRoundedUp = 1;  // scale_alg
  In x;
  Int axis;
  Text round_mode;
  DataType dst_type;
  Int block_size, scale_alg;
  Real dst_type_max, max_low_bound;
  Out y, mxscale;
  DSV4_ARGUMENTS(x, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max, max_low_bound,
                 y, mxscale)
};

}  // namespace dsv4::npu
