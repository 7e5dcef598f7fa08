// Fused scores and selection over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/indexer_rows.h"
// Beside it.
#include "cpu/offer_scores.h"

// One score from the dot products of all heads.
inline float combine(int64_t heads, const float* dots, const float* weights) {
  const Vec zero = Vec::broadcast(0.0f);
  Vec sum = zero;
  int64_t h = 0;
  for (; h + Vec::lanes <= heads; h += Vec::lanes) {
    sum = multiply_add(max(Vec::load(dots + h), zero), Vec::load(weights + h), sum);
  }
  if (h < heads) {
    sum = multiply_add(max(load_first(dots + h, heads - h), zero), Vec::load(weights + h), sum);
  }
  return sum.sum();
}

// Offers the entries begin .. end - 1 to the best of tokens first .. first + count - 1, which are
// of one sequence.
template <class X>
void select_sequence(const dsv4::cpu::IndexerQuery& query, int64_t sequence, int64_t first,
                     int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                     float* memory) {
  const IndexerScratch s(query, memory);
  int64_t visible[kQueriesAtOnce];
  int64_t most = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = query.batch.position_of(first + t, sequence);
    visible[t] = dsv4::cpu::visible_entries(position, query.ratio);
    most = visible[t] > most ? visible[t] : most;
    if (visible[t] > begin) pack_query<X, float>(query, s, first + t, t);
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
      float scores[kKeysAtOnce];
      for (int64_t i = 0; i < seen; ++i) {
        scores[i] = combine(query.heads, s.dots + i * s.heads, s.weights + t * s.heads);
      }
      offer(best[t], scores, seen, key);
    }
  }
}

void select_tokens(const dsv4::cpu::IndexerQuery& query, int64_t sequence, int64_t first,
                   int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                   float* memory) {
  switch (query.dtype) {
    case dsv4::DType::f32:
      return select_sequence<float>(query, sequence, first, count, begin, end, best, memory);
    case dsv4::DType::bf16:
      return select_sequence<dsv4::BFloat16>(query, sequence, first, count, begin, end, best,
                                             memory);
    case dsv4::DType::f16:
      return select_sequence<dsv4::Half>(query, sequence, first, count, begin, end, best, memory);
  }
}
