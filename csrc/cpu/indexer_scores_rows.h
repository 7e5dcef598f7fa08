// The indexer's scores over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/indexer_rows.h"
// Beside it.
#include "cpu/round_to.h"

// One score from the dot products of all heads.
template <class X>
X combine(const dsv4::cpu::IndexerQuery& query, const float* dots, const float* weights) {
  const X* type = nullptr;
  const Vec zero = Vec::broadcast(0.0f);
  Vec sum = zero;
  int64_t h = 0;
  for (; h + Vec::lanes <= query.heads; h += Vec::lanes) {
    const Vec dot = max(rounded(Vec::load(dots + h), type), zero);
    sum = sum + rounded(dot * Vec::load(weights + h), type);
  }
  if (h < query.heads) {
    const Vec dot = max(rounded(load_first(dots + h, query.heads - h), type), zero);
    sum = sum + rounded(dot * Vec::load(weights + h), type);
  }
  return dsv4::from_float<X>(sum.sum());
}

template <class X>
void hide(const dsv4::cpu::IndexerScores& call, int64_t token, int64_t begin, int64_t end) {
  auto* scores = reinterpret_cast<X*>(call.scores) + token * call.entries;
  const X lowest = dsv4::from_float<X>(-__builtin_inff());
  for (int64_t i = begin; i < end; ++i) scores[i] = lowest;
}

// Entries begin .. end - 1 for tokens first .. first + count - 1 of one sequence.
template <class X>
void score_sequence(const dsv4::cpu::IndexerScores& call, int64_t sequence, int64_t first,
                    int64_t count, int64_t begin, int64_t end, float* memory) {
  const dsv4::cpu::IndexerQuery& query = call.query;
  const IndexerScratch s(query, memory);
  int64_t visible[kQueriesAtOnce];
  int64_t most = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = query.batch.position_of(first + t, sequence);
    visible[t] = dsv4::cpu::visible_entries(position, query.ratio);
    most = visible[t] > most ? visible[t] : most;
    hide<X>(call, first + t, visible[t] > begin ? visible[t] : begin, end);
    if (visible[t] > begin) pack_query<X, X>(query, s, first + t, t);
  }
  const int64_t last = most < end ? most : end;
  KeyTiles tiles(query, s, sequence, begin, last);
  for (int64_t key = begin; key < last; key += kKeysAtOnce) {
    const int64_t keys = tiles.next<X>();
    for (int64_t t = 0; t < count; ++t) {
      const int64_t seen = visible[t] - key < keys ? visible[t] - key : keys;
      if (seen <= 0) {
        continue;
      }
      multiply_keys(s.keys, seen, s.key_stride, s.panels + t * s.heads * query.channels, s.heads,
                    query.channels, s.dots, s.heads);
      auto* scores = reinterpret_cast<X*>(call.scores) + (first + t) * call.entries + key;
      for (int64_t i = 0; i < seen; ++i) {
        scores[i] = combine<X>(query, s.dots + i * s.heads, s.weights + t * s.heads);
      }
    }
  }
}

void score_tokens(const dsv4::cpu::IndexerScores& call, int64_t sequence, int64_t first,
                  int64_t count, int64_t begin, int64_t end, float* memory) {
  switch (call.query.dtype) {
    case dsv4::DType::f32:
      return score_sequence<float>(call, sequence, first, count, begin, end, memory);
    case dsv4::DType::bf16:
      return score_sequence<dsv4::BFloat16>(call, sequence, first, count, begin, end, memory);
    case dsv4::DType::f16:
      return score_sequence<dsv4::Half>(call, sequence, first, count, begin, end, memory);
  }
}
