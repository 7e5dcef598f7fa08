// How the indexer's work is cut: a few tokens share the keys of their sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/indexer_scores.h"
#include "cpu/parallel_rows.h"

namespace dsv4::cpu {

constexpr int64_t kTokensOfGroup = 8;
constexpr int64_t kEntriesOfSpan = 2048;

// Floats of the scratch of a group for any vector type.
inline int64_t indexer_scratch(const IndexerQuery& query) {
  const int64_t heads = query.heads + 16;
  return 64 * (query.channels + 32) + 64 * heads + kTokensOfGroup * heads * (query.channels + 2);
}

// Visits (sequence, first token, tokens) of every run of one sequence in a group.
template <class Visit>
void each_run(const IndexerQuery& query, int64_t group, const Visit& visit) {
  int64_t token = group * kTokensOfGroup;
  const int64_t after = std::min(query.tokens, token + kTokensOfGroup);
  while (token < after) {
    const int64_t s = query.batch.sequence_of(token);
    int64_t next = token + 1;
    while (next < after && query.batch.sequence_of(next) == s) ++next;
    visit(s, token, next - token);
    token = next;
  }
}

}  // namespace dsv4::cpu
