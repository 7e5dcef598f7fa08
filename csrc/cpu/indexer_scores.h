// Scores of the lightning indexer (spec/v4.md 4.5).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/paged.h"

namespace dsv4::cpu {

// Query heads of tokens, and the keys of their sequences; all of one dtype but the weights. Strides
// in bytes.
struct IndexerQuery {
  DType dtype;  // of values; codes have none
  int64_t tokens;
  int64_t heads;
  int64_t channels;
  const char* q;
  int64_t q_token_stride;
  int64_t q_head_stride;
  PagedRows keys;
  Batch batch;
  int64_t ratio;
  const char* weights;  // [tokens, heads]
  int64_t weights_token_stride;
  int64_t weights_head_stride;
};

// scores[t][i] = sum_h relu(q[t][h] . k[i]) * weights[t][h] for every entry i of the table, -inf
// from the first that the token does not see on. Dot products, their products with the weights and
// the sum are rounded to q's dtype. The bits of a score depend on that query and that key alone.
struct IndexerScores {
  IndexerQuery query;  // weights in q's dtype
  int64_t entries;
  char* scores;  // [tokens, entries]
};

void indexer_scores(const IndexerScores& call, Isa isa);

}  // namespace dsv4::cpu
