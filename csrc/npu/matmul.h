// aclnn functions of matrix products (spec/ascend-operators.md 4.7, 4.12).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct Matmul {  // bf16 inputs may have an fp32 result: fp32 sums that nothing rounds
  static constexpr const char* symbol = "aclnnMatmul";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
  static constexpr int8_t kKeepPrecision = 0;  // no HF32
  In self, mat2;
  Out out;
  Int8 cube_math_type;
  DSV4_ARGUMENTS(self, mat2, out, cube_math_type)
};

struct GroupedMatmul {  // rows of x sorted by group, each times its group's weight
  static constexpr const char* symbol = "aclnnGroupedMatmulV5";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 1}}};
  static constexpr int64_t kOneOutput = 3;  // split
  static constexpr int64_t kOutputEach = 0;
  static constexpr int64_t kAlongRows = 0;   // type
  static constexpr int64_t kApart = -1;      // one x, weight and output of each list
  static constexpr int64_t kPrefixSums = 0;  // list_type
  static constexpr int64_t kCounts = 1;
  static constexpr int64_t kNoActivation = 0;
  InList x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token;
  OptionalIn list;
  InList activation, activation_scale, activation_offset;
  Int split, type, list_type, act;
  OptionalInts tuning;
  OutList out, activation_feature, dynamic_scale;
  DSV4_ARGUMENTS(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token, list,
                 activation, activation_scale, activation_offset, split, type, list_type, act,
                 tuning, out, activation_feature, dynamic_scale)
};

struct GroupedMatmulWeightNz {  // the same for weights in tiles
  static constexpr const char* symbol = "aclnnGroupedMatmulWeightNz";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  InList x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token;
  OptionalIn list;
  InList activation, activation_scale, activation_offset;
  Int split, type, list_type, act;
  OptionalInts tuning;
  Int quant_group;
  OutList out, activation_feature, dynamic_scale;
  DSV4_ARGUMENTS(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token, list,
                 activation, activation_scale, activation_offset, split, type, list_type, act,
                 tuning, quant_group, out, activation_feature, dynamic_scale)
};

struct NpuFormatCast {  // between rows and tiles
  static constexpr const char* symbol = "aclnnNpuFormatCast";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  In from;
  Out to;
  DSV4_ARGUMENTS(from, to)
};

struct QuantMatmul {  // int8 with scales per row and column, or MX (A5)
  static constexpr const char* symbol = "aclnnQuantMatmulV5";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 2}}};
  static constexpr int64_t kNoGroups = 0;
  static constexpr int64_t kMxGroups = (1LL << 32) | (1LL << 16) | 32;       // [1, 1, 32]
  static constexpr int64_t kTileGroups = (1LL << 32) | (128LL << 16) | 128;  // [1, 128, 128]
  In x1, x2;
  OptionalIn x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias;
  Flag transpose1, transpose2;
  Int group;
  Out out;
  DSV4_ARGUMENTS(x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias,
                 transpose1, transpose2, group, out)
};

struct TransposeBatchMatmul {  // one product per group, with the axes in any order
  static constexpr const char* symbol = "aclnnTransposeBatchMatMul";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  static constexpr int8_t kKeepPrecision = 0;
  static constexpr int32_t kNotSplit = 1;
  In x1, x2;
  OptionalIn bias, scale;
  Ints perm_x1, perm_x2, perm_y;
  Int8 cube_math_type;
  Int32 batch_split_factor;
  Out out;
  DSV4_ARGUMENTS(x1, x2, bias, scale, perm_x1, perm_x2, perm_y, cube_math_type, batch_split_factor,
                 out)
};

struct TransposeQuantBatchMatmul {  // the same of MX-FP8 operands
  static constexpr const char* symbol = "aclnnTransposeQuantBatchMatMul";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kMxGroups = (1LL << 32) | (1LL << 16) | 32;  // [1, 1, 32]
  static constexpr int32_t kNotSplit = 1;
  In x1, x2;
  OptionalIn bias, x1_scale, x2_scale;
  Int32 dtype;
  Int group_size;
  Ints perm_x1, perm_x2, perm_y;
  Int32 batch_split_factor;
  Out out;
  DSV4_ARGUMENTS(x1, x2, bias, x1_scale, x2_scale, dtype, group_size, perm_x1, perm_x2, perm_y,
                 batch_split_factor, out)
};

}  // namespace dsv4::npu
