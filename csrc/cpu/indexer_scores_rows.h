// The indexer's scores over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/indexer_rows.h"

// What the products are for: scores that are stored.
template <class X>
struct StoredScores {
  const dsv4::cpu::IndexerScores& call;
  int64_t first;
  int64_t begin;
  int64_t end;

  X* of(int64_t place, int64_t entry) const {
    return reinterpret_cast<X*>(call.scores) + (first + place) * call.entries + entry;
  }

  // Entries that the token does not see.
  void starts(const IndexerScratch&, int64_t place, int64_t visible) {
    const X lowest = dsv4::from_float<X>(-__builtin_inff());
    X* scores = of(place, 0);
    for (int64_t i = visible > begin ? visible : begin; i < end; ++i) scores[i] = lowest;
  }

  void takes(const IndexerScratch& s, int64_t place, int64_t key, int64_t count) {
    X* scores = of(place, key);
    for (int64_t i = 0; i < count; ++i) {
      scores[i] =
          combine_rounded<X>(call.query.heads, s.dots + i * s.heads, s.weights + place * s.heads);
    }
  }
};

// Entries begin .. end - 1 for tokens first .. first + count - 1 of one sequence.
template <class X>
void score_sequence(const dsv4::cpu::IndexerScores& call, int64_t sequence, int64_t first,
                    int64_t count, int64_t begin, int64_t end, float* memory) {
  StoredScores<X> pass{call, first, begin, end};
  multiply_tiles<X, X>(call.query, sequence, first, count, begin, end, memory, pass);
}

void score_tokens(const dsv4::cpu::IndexerScores& call, int64_t sequence, int64_t first,
                  int64_t count, int64_t begin, int64_t end, float* memory) {
  DSV4_FOR_DTYPE(call.query.dtype, score_sequence, call, sequence, first, count, begin, end,
                 memory);
}
