// Scores of keys for a few queries at a time, over a `Vec`: keys are widened once for all of them.
// Included by rows headers inside a namespace, so it includes nothing and has no guard but the
// header of its products.

#include "cpu/key_products.h"

constexpr int64_t kKeysAtOnce = 64;
constexpr int64_t kQueriesAtOnce = 8;

// Where the intermediate values of up to kQueriesAtOnce queries are.
struct IndexerScratch {
  int64_t heads;       // padded
  int64_t key_stride;  // in elements: no power of two
  float* keys;         // [kKeysAtOnce, key_stride]
  float* dots;         // [kKeysAtOnce, heads]
  float* panels;       // [kQueriesAtOnce, heads * channels]
  float* weights;      // [kQueriesAtOnce, heads], 0 for the padding
  float* scales;       // [kQueriesAtOnce, heads] of rows of codes, 0 for the padding

  IndexerScratch(const dsv4::cpu::IndexerQuery& query, float* memory)
      : heads(padded_heads(query.heads)),
        key_stride((query.channels + Vec::lanes - 1) / Vec::lanes * Vec::lanes + 16),
        keys(memory),
        dots(keys + kKeysAtOnce * key_stride),
        panels(dots + kKeysAtOnce * heads),
        weights(panels + kQueriesAtOnce * heads * query.channels),
        scales(weights + kQueriesAtOnce * heads) {}
};

// One number of each head, 0 for the padding.
template <class W>
void widen_heads(const dsv4::cpu::IndexerQuery& query, const IndexerScratch& s, const char* from,
                 int64_t stride, float* to) {
  for (int64_t h = 0; h < s.heads; ++h) {
    const auto* value = reinterpret_cast<const W*>(from + h * stride);
    to[h] = h < query.heads ? dsv4::to_float(*value) : 0.0f;
  }
}

// A token's heads, by way of the keys' memory, and its weights.
template <class X, class W>
void pack_query(const dsv4::cpu::IndexerQuery& query, const IndexerScratch& s, int64_t token,
                int64_t place) {
  const char* q = query.q + token * query.q_token_stride;
  float* panels = s.panels + place * s.heads * query.channels;
  for (int64_t first = 0; first < query.heads; first += 2 * Vec::lanes) {
    const int64_t rest = query.heads - first;
    const int64_t count = rest < 2 * Vec::lanes ? rest : 2 * Vec::lanes;
    for (int64_t h = 0; h < count; ++h) {
      widen_row(reinterpret_cast<const X*>(q + (first + h) * query.q_head_stride), query.channels,
                s.keys + h * s.key_stride, s.key_stride - 16);
    }
    pack_heads(s.keys, s.key_stride, count, query.channels, panels + first * query.channels);
  }
  widen_heads<W>(query, s, query.weights + token * query.weights_token_stride,
                 query.weights_head_stride, s.weights + place * s.heads);
}

// One score from the dot products of all heads, every tensor rounded to X.
template <class X>
X combine_rounded(int64_t heads, const float* dots, const float* weights) {
  const Vec zero = Vec::broadcast(0.0f);
  Vec sum = zero;
  int64_t h = 0;
  for (; h + Vec::lanes <= heads; h += Vec::lanes) {
    const Vec dot = max(rounded<X>(Vec::load(dots + h)), zero);
    sum = sum + rounded<X>(dot * Vec::load(weights + h));
  }
  if (h < heads) {
    const Vec dot = max(rounded<X>(load_first(dots + h, heads - h)), zero);
    sum = sum + rounded<X>(dot * Vec::load(weights + h));
  }
  return dsv4::from_float<X>(sum.sum());
}

// Rows of the entries first .. first + count - 1 of a sequence, null where there is none.
inline void find_keys(const dsv4::cpu::IndexerQuery& query, int64_t sequence, int64_t first,
                      int64_t count, const char** rows) {
  for (int64_t i = 0; i < count; ++i) rows[i] = query.keys.row(sequence, first + i);
}

// Keys as fp32, 0 for none.
template <class X>
void widen_keys(const dsv4::cpu::IndexerQuery& query, const IndexerScratch& s,
                const char* const* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float* to = s.keys + i * s.key_stride;
    if (rows[i] != nullptr) {
      widen_row(reinterpret_cast<const X*>(rows[i]), query.channels, to, s.key_stride - 16);
    } else {
      __builtin_memset(to, 0, static_cast<size_t>(query.channels) * sizeof(float));
    }
  }
}

// Tiles of the entries begin .. end - 1 of a sequence, one after the other, as fp32 keys.
class KeyTiles {
 public:
  KeyTiles(const dsv4::cpu::IndexerQuery& query, const IndexerScratch& scratch, int64_t sequence,
           int64_t begin, int64_t end)
      : query_(query), scratch_(scratch), sequence_(sequence), end_(end) {
    find(begin);
  }

  // Widens the next tile, and fetches the one behind it meanwhile: its number of keys.
  template <class X>
  int64_t next() {
    const int64_t count = count_;
    widen_keys<X>(query_, scratch_, rows_, count);
    find(first_ + count);
    prefetch_rows(rows_, count_, query_.channels * static_cast<int64_t>(sizeof(X)));
    return count;
  }

 private:
  void find(int64_t first) {
    first_ = first;
    count_ = end_ - first < kKeysAtOnce ? end_ - first : kKeysAtOnce;
    if (count_ < 0) count_ = 0;
    find_keys(query_, sequence_, first_, count_, rows_);
  }

  const dsv4::cpu::IndexerQuery& query_;
  const IndexerScratch& scratch_;
  int64_t sequence_;
  int64_t end_;
  int64_t first_ = 0;
  int64_t count_ = 0;
  const char* rows_[kKeysAtOnce];
};

// Dot products of the entries begin .. end - 1 for tokens first .. first + count - 1, which are of
// one sequence, a tile of keys after the other. W: type of weights.
//
// `pass` says what they are for: pass.starts(scratch, place, visible) of every token before its
// first tile, and pass.takes(scratch, place, key, count) where scratch.dots has the products of
// `count` entries from `key` on.
template <class X, class W, class Pass>
void multiply_tiles(const dsv4::cpu::IndexerQuery& query, int64_t sequence, int64_t first,
                    int64_t count, int64_t begin, int64_t end, float* memory, Pass& pass) {
  const IndexerScratch s(query, memory);
  int64_t visible[kQueriesAtOnce];
  int64_t most = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = query.batch.position_of(first + t, sequence);
    visible[t] = dsv4::cpu::visible_entries(position, query.ratio);
    most = visible[t] > most ? visible[t] : most;
    if (visible[t] > begin) pack_query<X, W>(query, s, first + t, t);
    pass.starts(s, t, visible[t]);
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
      pass.takes(s, t, key, seen);
    }
  }
}
