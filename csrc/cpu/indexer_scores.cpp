#include "cpu/indexer_scores.h"

#include <cstring>

#include "cpu/indexer_groups.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/indexer_scores_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void indexer_scores(const IndexerScores& call, Isa isa) {
  const IndexerQuery& query = call.query;
  if (query.tokens == 0 || call.entries == 0) {
    return;
  }
  if (query.batch.sequences() == 0) {  // tokens of no sequence, which only unchecked calls have
    const int64_t bytes = bytes_of(query.dtype);
    std::memset(call.scores, 0, static_cast<size_t>(query.tokens * call.entries * bytes));
    return;
  }
  // Groups of tokens times spans of entries.
  const int64_t groups = (query.tokens + kTokensOfGroup - 1) / kTokensOfGroup;
  const int64_t spans = (call.entries + kEntriesOfSpan - 1) / kEntriesOfSpan;
  const int64_t products = std::min(call.entries, kEntriesOfSpan) * query.heads * query.channels *
                           std::min(query.tokens, kTokensOfGroup);
  const auto score = DSV4_FOR_ISA(isa, score_tokens);
  parallel_for(groups * spans, grain_of(kProductsPerThread, products),
               [&](int64_t begin, int64_t end) {
                 thread_local ThreadBuffer buffer;
                 float* memory = buffer.of<float>(indexer_scratch(query));
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t first = unit % spans * kEntriesOfSpan;
                   const int64_t last = std::min(call.entries, first + kEntriesOfSpan);
                   each_run(query, unit / spans, [&](int64_t s, int64_t token, int64_t count) {
                     score(call, s, token, count, first, last, memory);
                   });
                 }
               });
}

}  // namespace dsv4::cpu
