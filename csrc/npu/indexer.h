// aclnn functions of the lightning indexer (spec/ascend-operators.md 4.10 C and D).
#pragma once

#include "function.h"

namespace dsv4::npu {

inline constexpr int64_t kIndexWidth = 128;
inline constexpr int64_t kVisibleEntries = 3;  // mask_mode: those that closed before a query

// Scores of keys that stand for cmp_ratio tokens each, and the topk best of each query.
struct LightningIndexer {
  static constexpr const char* symbol = "aclnnLightningIndexerV2";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  In q, k, weights;
  OptionalIn cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k, block_table,
      output_idx_offset, metadata;
  Int topk, max_seqlen_q;
  Text layout_q, layout_k;
  Int mask_mode, cmp_ratio, return_value;
  Out sparse_indices, sparse_values;
  DSV4_ARGUMENTS(q, k, weights, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k,
                 block_table, output_idx_offset, metadata, topk, max_seqlen_q, layout_q, layout_k,
                 mask_mode, cmp_ratio, return_value, sparse_indices, sparse_values)
};

// The same of rows of codes with a scale each.
struct QuantLightningIndexer {
  static constexpr const char* symbol = "aclnnQuantLightningIndexerV2";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  static constexpr int64_t kE4m3 = 1, kInt8 = 2;  // quant_mode: on A5, on A2 and A3
  In q, k, weights, q_descale, k_descale;
  OptionalIn cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k, block_table,
      output_idx_offset, metadata;
  Int topk, quant_mode, max_seqlen_q;
  Text layout_q, layout_k;
  Int mask_mode, cmp_ratio, return_value;
  Out sparse_indices, sparse_values;
  DSV4_ARGUMENTS(q, k, weights, q_descale, k_descale, cu_seqlens_q, cu_seqlens_k, seqused_q,
                 seqused_k, cmp_residual_k, block_table, output_idx_offset, metadata, topk,
                 quant_mode, max_seqlen_q, layout_q, layout_k, mask_mode, cmp_ratio, return_value,
                 sparse_indices, sparse_values)
};

}  // namespace dsv4::npu
