// aclnn functions of attention over paged rows (spec/ascend-operators.md 4.11 D and E).
#pragma once

#include "function.h"

namespace dsv4::npu {

inline constexpr std::array kV4Attention = {Version{Package::builtin, kAllChips, {9, 1}}};
inline constexpr int64_t kMetadata = 1024;  // int32 values, of every metadata function

// How a batch is split over cores; what it holds depends on the lengths.
struct SparseFlashMlaMetadata {
  static constexpr const char* symbol = "aclnnSparseFlashMlaMetadata";
  static constexpr std::array versions = kV4Attention;
  OptionalIn cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
      seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length;
  Int num_heads_q, num_heads_kv, head_dim, batch_size, max_seqlen_q, max_seqlen_ori_kv,
      max_seqlen_cmp_kv, ori_topk, cmp_topk, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left,
      ori_win_right;
  Text layout_q, layout_kv;
  Flag has_ori_kv, has_cmp_kv;
  Out metadata;
  DSV4_ARGUMENTS(cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
                 seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length, num_heads_q,
                 num_heads_kv, head_dim, batch_size, max_seqlen_q, max_seqlen_ori_kv,
                 max_seqlen_cmp_kv, ori_topk, cmp_topk, cmp_ratio, ori_mask_mode, cmp_mask_mode,
                 ori_win_left, ori_win_right, layout_q, layout_kv, has_ori_kv, has_cmp_kv, metadata)
};

// 512-wide heads that share one row as key and value: a window, and compressed rows, all or chosen.
struct SparseFlashMla {
  static constexpr const char* symbol = "aclnnSparseFlashMla";
  static constexpr std::array versions = kV4Attention;
  static constexpr int64_t kWidth = 512;
  static constexpr int64_t kWindow = 4, kCausal = 3;  // mask modes
  static constexpr int64_t kDefaultValues = 1;        // topk_value_mode
  In q;
  OptionalIn ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
      cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q,
      seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length;
  In sinks, metadata;
  Real softmax_scale;
  Int cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right;
  Text layout_q, layout_kv;
  Int topk_value_mode;
  Flag return_softmax_lse;
  Out attention_out;
  OptionalOut softmax_lse;
  DSV4_ARGUMENTS(q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
                 cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q,
                 seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length,
                 sinks, metadata, softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode,
                 ori_win_left, ori_win_right, layout_q, layout_kv, topk_value_mode,
                 return_softmax_lse, attention_out, softmax_lse)
};

inline constexpr std::array kFp8Attention = {Version{Package::builtin, kA5, {9, 1}}};

struct MixedQuantSparseFlashMlaMetadata : SparseFlashMlaMetadata {
  static constexpr const char* symbol = "aclnnMixedQuantSparseFlashMlaMetadata";
  static constexpr std::array versions = kFp8Attention;
  Int quant_mode, rope_head_dim;
  DSV4_ARGUMENTS(cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
                 seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length, num_heads_q,
                 num_heads_kv, head_dim, quant_mode, batch_size, max_seqlen_q, max_seqlen_ori_kv,
                 max_seqlen_cmp_kv, ori_topk, cmp_topk, rope_head_dim, cmp_ratio, ori_mask_mode,
                 cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv, has_ori_kv,
                 has_cmp_kv, metadata)
};

// The same over rows of e4m3 codes with scales, which it widens to bf16.
struct MixedQuantSparseFlashMla : SparseFlashMla {
  static constexpr const char* symbol = "aclnnMixedQuantSparseFlashMla";
  static constexpr std::array versions = kFp8Attention;
  static constexpr int64_t kBf16Scales = 1;  // quant_mode: rows of 608 bytes
  static constexpr int64_t kRope = 64;
  Int quant_mode, rope_head_dim;
  DSV4_ARGUMENTS(q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
                 cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q,
                 seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length,
                 sinks, metadata, quant_mode, rope_head_dim, softmax_scale, cmp_ratio,
                 ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv,
                 topk_value_mode, return_softmax_lse, attention_out, softmax_lse)
};

}  // namespace dsv4::npu
