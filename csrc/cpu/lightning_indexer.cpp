#include "cpu/lightning_indexer.h"

#include <algorithm>
#include <cstring>

#include "cpu/best_entries.h"
#include "cpu/indexer_groups.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/lightning_indexer_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kMostSpans = 8;  // of entries, where there are few tokens

int64_t most_visible(const IndexerQuery& query) {
  int64_t most = 0;
  for (int64_t s = 0; s < query.batch.sequences(); ++s) {
    most = std::max(most, visible_entries(query.batch.length(s) - 1, query.ratio));
  }
  return most;
}

// The best of one span of entries for the tokens of a group.
struct Span {
  int64_t begin;
  int64_t end;
  BestEntries best[kTokensOfGroup];
};

// `best` of every token, with room for `capacity` entries.
void select_group(const LightningIndexer& call, int64_t group, Span& span, int64_t best,
                  int64_t capacity, uint64_t* entries, Isa isa) {
  thread_local ThreadBuffer buffer;
  float* memory = buffer.of<float>(indexer_scratch(call.query));
  const auto select = DSV4_FOR_ISA(isa, select_tokens);
  for (int64_t t = 0; t < kTokensOfGroup; ++t) {
    span.best[t] = {entries + t * capacity, capacity, best};
  }
  each_run(call.query, group, [&](int64_t s, int64_t token, int64_t count) {
    select(call, s, token, count, span.begin, span.end,
           span.best + (token - group * kTokensOfGroup), memory);
  });
}

// The best of all spans, in the memory of the first.
void merge_spans(const LightningIndexer& call, int64_t group, Span* spans, int64_t count) {
  const int64_t first = group * kTokensOfGroup;
  const int64_t after = std::min(call.query.tokens, first + kTokensOfGroup);
  for (int64_t token = first; token < after; ++token) {
    BestEntries& all = spans[0].best[token - first];
    for (int64_t i = 1; i < count; ++i) {
      BestEntries& some = spans[i].best[token - first];
      all.keep();
      some.keep();
      all.undefined |= some.undefined;
      std::memcpy(all.entries + all.count, some.entries,
                  static_cast<size_t>(some.count) * sizeof(uint64_t));
      all.count += some.count;
    }
    int32_t* chosen = call.chosen + token * call.k;
    all.indices(chosen, call.format == RowFormat::rounded);
    std::fill(chosen + all.k, chosen + call.k, -1);
    if (all.undefined) {
      std::fill(chosen, chosen + call.k, kUndefined);
    }
  }
}

}  // namespace

void lightning_indexer(const LightningIndexer& call, Isa isa) {
  const IndexerQuery& query = call.query;
  if (query.tokens == 0 || query.batch.sequences() == 0) {  // tokens of no sequence see nothing
    std::fill(call.chosen, call.chosen + query.tokens * call.k, -1);
    return;
  }
  const int64_t seen = std::min(call.entries, most_visible(query));
  const int64_t groups = (query.tokens + kTokensOfGroup - 1) / kTokensOfGroup;
  // Groups are work enough where there are many.
  const int64_t wanted = groups >= kMostSpans ? 1 : (seen + kEntriesOfSpan - 1) / kEntriesOfSpan;
  const int64_t spans = std::clamp(wanted, int64_t{1}, kMostSpans);
  const int64_t width = (seen + spans - 1) / spans;
  const int64_t best = std::min(call.k, seen);
  // Room for the best of two spans.
  const int64_t capacity = std::max(best_entries_capacity(best, seen), spans > 1 ? 2 * best : 0);
  const int64_t products =
      std::min(query.tokens, kTokensOfGroup) * width * query.heads * query.channels;
  const int64_t grain = grain_of(kProductsPerThread, products);
  const int64_t of_group = kTokensOfGroup * capacity;
  if (spans == 1) {
    parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
      thread_local ThreadBuffer kept;
      Span span{0, seen, {}};
      for (int64_t group = begin; group < end; ++group) {
        select_group(call, group, span, best, capacity, kept.of<uint64_t>(of_group), isa);
        merge_spans(call, group, &span, 1);
      }
    });
    return;
  }
  thread_local ThreadBuffer kept, cut;
  auto* entries = kept.of<uint64_t>(groups * spans * of_group);
  auto* all = cut.of<Span>(groups * spans);
  parallel_for(groups * spans, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % spans * width;
      all[unit] = {first, std::min(seen, first + width), {}};
      select_group(call, unit / spans, all[unit], best, capacity, entries + unit * of_group, isa);
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    merge_spans(call, group, all + group * spans, spans);
  }
}

}  // namespace dsv4::cpu
