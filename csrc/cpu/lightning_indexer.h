// Scores and selection of the lightning indexer in one step (spec/v4.md 4.5, spec/deployments.md
// 6).
#pragma once

#include "cpu/indexer_scores.h"

namespace dsv4::cpu {

// Of queries and keys; scores of `rounded` values are those of indexer_scores.
enum class RowFormat : uint8_t { values, rounded, int8, e4m3 };

constexpr int32_t kUndefined = -2;

// chosen[t] = indices of the k visible entries with the largest sum_h relu(q[t][h] . key) *
// weights[t][h] in fp32, in any order, then -1; of equal scores the smaller index. Memory does not
// grow with the number of entries: scores are offered to the best ones as they are made.
//
// Of rows of codes the dot product is multiplied by the scales of both rows, and of e4m3 the sum is
// rounded to bf16. Of rounded values the best entry is the first, and a token with a NaN among its
// scores chooses kUndefined.
struct LightningIndexer {
  RowFormat format;
  IndexerQuery query;   // weights in fp32, of rounded values in their dtype, of int8 in fp16
  const char* q_scale;  // of codes [tokens, heads] in the weights' dtype, strides in bytes
  int64_t q_scale_token_stride;
  int64_t q_scale_head_stride;
  PagedRows key_scales;
  int64_t entries;
  int64_t k;
  int32_t* chosen;  // [tokens, k]
};

void lightning_indexer(const LightningIndexer& call, Isa isa);

}  // namespace dsv4::cpu
