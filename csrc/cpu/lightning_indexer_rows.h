// Fused scores and selection over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/code_rows.h"
// After the rows of codes that it may widen.
#include "cpu/indexer_rows.h"
// Beside it.
#include "cpu/offer_scores.h"

// One score from the dot products of all heads.
inline float combine(int64_t heads, const float* dots, const float* weights) {
  const Vec zero = Vec::broadcast(0.0f);
  Vec sum = zero;
  for (int64_t h = 0; h < heads; h += Vec::lanes) {
    sum = multiply_add(max(load_first(dots + h, heads - h), zero), Vec::load(weights + h), sum);
  }
  return sum.sum();
}

// The same of codes, with the scales of the heads' rows and of the key.
inline float combine_codes(int64_t heads, const float* dots, const float* scales, float key_scale,
                           const float* weights) {
  const Vec zero = Vec::broadcast(0.0f), of_key = Vec::broadcast(key_scale);
  Vec sum = zero;
  for (int64_t h = 0; h < heads; h += Vec::lanes) {
    const Vec dot = load_first(dots + h, heads - h) * Vec::load(scales + h) * of_key;
    sum = multiply_add(max(dot, zero), Vec::load(weights + h), sum);
  }
  return sum.sum();
}

template <class X, class W>
void score_keys(const dsv4::cpu::LightningIndexer& call, const IndexerScratch& s, int64_t sequence,
                int64_t key, int64_t count, int64_t place, float* scores) {
  const int64_t heads = call.query.heads;
  const float* weights = s.weights + place * s.heads;
  for (int64_t i = 0; i < count; ++i) {
    const float* dots = s.dots + i * s.heads;
    if constexpr (CodeType<X>::value) {
      const char* at = call.key_scales.row(sequence, key + i);
      const float scale = at == nullptr ? 0 : dsv4::to_float(*reinterpret_cast<const W*>(at));
      scores[i] = CodeType<X>::selectable(
          combine_codes(heads, dots, s.scales + place * s.heads, scale, weights));
    } else {
      scores[i] = combine(heads, dots, weights);
    }
  }
}

// Offers the entries begin .. end - 1 to the best of tokens first .. first + count - 1, which are
// of one sequence.
template <class X, class W>
void select_sequence(const dsv4::cpu::LightningIndexer& call, int64_t sequence, int64_t first,
                     int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                     float* memory) {
  const dsv4::cpu::IndexerQuery& query = call.query;
  const IndexerScratch s(query, memory);
  int64_t visible[kQueriesAtOnce];
  int64_t most = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = query.batch.position_of(first + t, sequence);
    visible[t] = dsv4::cpu::visible_entries(position, query.ratio);
    most = visible[t] > most ? visible[t] : most;
    if (visible[t] <= begin) {
      continue;
    }
    pack_query<X, W>(query, s, first + t, t);
    if constexpr (CodeType<X>::value) {
      widen_heads<W>(query, s, call.q_scale + (first + t) * call.q_scale_token_stride,
                     call.q_scale_head_stride, s.scales + t * s.heads);
    }
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
      score_keys<X, W>(call, s, sequence, key, seen, t, scores);
      offer(best[t], scores, seen, key);
    }
  }
}

void select_tokens(const dsv4::cpu::LightningIndexer& call, int64_t sequence, int64_t first,
                   int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                   float* memory) {
  switch (call.format) {
    case dsv4::cpu::RowFormat::int8:
      return select_sequence<Int8Code, dsv4::Half>(call, sequence, first, count, begin, end, best,
                                                   memory);
    case dsv4::cpu::RowFormat::e4m3:
      return select_sequence<E4m3Code, float>(call, sequence, first, count, begin, end, best,
                                              memory);
    case dsv4::cpu::RowFormat::values:
      break;
  }
  switch (call.query.dtype) {
    case dsv4::DType::f32:
      return select_sequence<float, float>(call, sequence, first, count, begin, end, best, memory);
    case dsv4::DType::bf16:
      return select_sequence<dsv4::BFloat16, float>(call, sequence, first, count, begin, end, best,
                                                    memory);
    case dsv4::DType::f16:
      return select_sequence<dsv4::Half, float>(call, sequence, first, count, begin, end, best,
                                                memory);
  }
}
