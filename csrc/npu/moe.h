// aclnn functions of expert routing (spec/ascend-operators.md 4.13, 4.15).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct MoeInitRouting {  // rows of x once per chosen expert, sorted by expert
  static constexpr const char* symbol = "aclnnMoeInitRoutingV3";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 3}}};
  static constexpr int64_t kEveryRow = 0;    // drop_pad
  static constexpr int64_t kPrefixSums = 0;  // tokens_type
  static constexpr int64_t kCounts = 1;
  static constexpr int64_t kUnquantised = -1;
  static constexpr int64_t kToRow = 0;    // row_type: where a choice's row of x_out is
  static constexpr int64_t kFromRow = 1;  // or where a row of x_out comes from
  In x, experts;
  OptionalIn scale, offset;
  Int active, capacity, count, drop_pad, tokens_type;
  Flag tokens_flag;
  Int quant;
  Ints range;
  Int row_type;
  Out x_out, row_index, tokens, scale_out;
  DSV4_ARGUMENTS(x, experts, scale, offset, active, capacity, count, drop_pad, tokens_type,
                 tokens_flag, quant, range, row_type, x_out, row_index, tokens, scale_out)
};

struct MoeFinalizeRouting {  // sum of each token's k rows times scales
  static constexpr const char* symbol = "aclnnMoeFinalizeRoutingV2";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
  static constexpr int64_t kTokenMajor = 2;  // drop_pad_mode: to_row is [T, k], nothing dropped
  In rows, to_row;
  OptionalIn skip1, skip2, bias, scales, experts;
  Int drop_pad_mode;
  Out out;
  DSV4_ARGUMENTS(rows, to_row, skip1, skip2, bias, scales, experts, drop_pad_mode, out)
};

struct Gating {  // logits [T, E] -> weights and ids of k experts, by score or by table
  static constexpr int64_t kSigmoid = 1;  // norm_type
  static constexpr int64_t kSqrtSoftplus = 2;
  In x;
  OptionalIn bias, input_ids, tid2eid;
  Int k, k_group, group_count, group_select_mode, renorm, norm_type;
  Flag out_flag;
  Real routed_scaling_factor, eps;
  Out y, expert_idx, out;
  DSV4_ARGUMENTS(x, bias, input_ids, tid2eid, k, k_group, group_count, group_select_mode, renorm,
                 norm_type, out_flag, routed_scaling_factor, eps, y, expert_idx, out)
};

struct MoeGatingTopK : Gating {  // kSqrtSoftplus on A5 only
  static constexpr const char* symbol = "aclnnMoeGatingTopKV2";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
};

// Of vllm-ascend and of cann-recipes-infer, with the same arguments in both: kSqrtSoftplus on every
// chip. The installation page of the first wants CANN 9.1.0; no page states one for the second.
struct MoeGatingTopKHash : Gating {
  static constexpr const char* symbol = "aclnnMoeGatingTopKHash";
  static constexpr std::array versions = {Version{Package::vllm_ascend, kAllChips, {9, 1}},
                                          Version{Package::recipes, kAllChips, {9, 1}}};
};

}  // namespace dsv4::npu
