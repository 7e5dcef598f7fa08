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

// What the products are for: scores that are offered to the best of every token.
template <class X, class W>
struct OfferedScores {
  const dsv4::cpu::LightningIndexer& call;
  int64_t sequence;
  int64_t first;
  int64_t begin;
  dsv4::cpu::BestEntries* best;

  void starts(const IndexerScratch& s, int64_t place, int64_t visible) {
    if constexpr (CodeType<X>::value) {
      if (visible > begin) {
        widen_heads<W>(call.query, s, call.q_scale + (first + place) * call.q_scale_token_stride,
                       call.q_scale_head_stride, s.scales + place * s.heads);
      }
    }
  }

  void takes(const IndexerScratch& s, int64_t place, int64_t key, int64_t count) {
    float scores[kKeysAtOnce];
    score_keys<X, W>(call, s, sequence, key, count, place, scores);
    offer(best[place], scores, count, key);
  }
};

// The same of scores that are rounded to X at every step.
template <class X>
struct OfferedRounded {
  int64_t heads;
  dsv4::cpu::BestEntries* best;

  void starts(const IndexerScratch&, int64_t, int64_t) {}

  void takes(const IndexerScratch& s, int64_t place, int64_t key, int64_t count) {
    X scores[kKeysAtOnce];
    bool undefined = false;
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = combine_rounded<X>(heads, s.dots + i * s.heads, s.weights + place * s.heads);
      const float score = dsv4::to_float(scores[i]);
      undefined |= score != score;
    }
    best[place].undefined |= undefined;
    offer(best[place], scores, count, key);
  }
};

// Offers the entries begin .. end - 1 to the best of tokens first .. first + count - 1, which are
// of one sequence.
template <class X, class W = float>
void select_sequence(const dsv4::cpu::LightningIndexer& call, int64_t sequence, int64_t first,
                     int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                     float* memory) {
  OfferedScores<X, W> pass{call, sequence, first, begin, best};
  multiply_tiles<X, W>(call.query, sequence, first, count, begin, end, memory, pass);
}

template <class X>
void select_rounded(const dsv4::cpu::LightningIndexer& call, int64_t sequence, int64_t first,
                    int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                    float* memory) {
  OfferedRounded<X> pass{call.query.heads, best};
  multiply_tiles<X, X>(call.query, sequence, first, count, begin, end, memory, pass);
}

void select_tokens(const dsv4::cpu::LightningIndexer& call, int64_t sequence, int64_t first,
                   int64_t count, int64_t begin, int64_t end, dsv4::cpu::BestEntries* best,
                   float* memory) {
  switch (call.format) {
    case dsv4::cpu::RowFormat::int8:
      return select_sequence<Int8Code, dsv4::Half>(call, sequence, first, count, begin, end, best,
                                                   memory);
    case dsv4::cpu::RowFormat::e4m3:
      return select_sequence<E4m3Code>(call, sequence, first, count, begin, end, best, memory);
    case dsv4::cpu::RowFormat::rounded:
      DSV4_FOR_DTYPE(call.query.dtype, select_rounded, call, sequence, first, count, begin, end,
                     best, memory);
      return;
    case dsv4::cpu::RowFormat::values:
      break;
  }
  DSV4_FOR_DTYPE(call.query.dtype, select_sequence, call, sequence, first, count, begin, end, best,
                 memory);
}
