// Sparse attention over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/key_products.h"

// Where the intermediate values of some heads of a token are.
struct AttentionScratch {
  int64_t heads;       // padded
  int64_t row_stride;  // of keys and of values, in elements: no power of two
  float* panels;
  float* keys;     // [tile, row_stride]
  float* scores;   // [tile, heads]
  float* values;   // [heads, row_stride]
  float* peaks;    // [heads]
  float* totals;   // [heads]
  float* rescale;  // [heads]

  AttentionScratch(int64_t real_heads, int64_t channels, int64_t tile, float* memory)
      : heads(padded_heads(real_heads)),
        row_stride((channels + 2 * Vec::lanes - 1) / (2 * Vec::lanes) * (2 * Vec::lanes) + 16),
        panels(memory),
        keys(panels + heads * channels),
        scores(keys + tile * row_stride),
        values(scores + tile * heads),
        peaks(values + heads * row_stride),
        totals(peaks + heads),
        rescale(totals + heads) {}
};

// Scores [count, heads] become probabilities; peaks, totals and rescale follow.
template <class X>
void soften(const AttentionScratch& s, int64_t count, float scale) {
  const Vec factor = Vec::broadcast(scale);
  for (int64_t h = 0; h < s.heads; h += Vec::lanes) {
    float* column = s.scores + h;
    const Vec before = Vec::load(s.peaks + h);
    Vec peak = before;
    for (int64_t k = 0; k < count; ++k) {
      float* at = column + k * s.heads;
      const Vec score = Vec::load(at) * factor;
      score.store(at);
      peak = max(score, peak);
    }
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      float* at = column + k * s.heads;
      const Vec p = exp(Vec::load(at) - peak);
      sum = sum + p;
      rounded<X>(p).store(at);
    }
    const Vec rescale = exp(before - peak);
    peak.store(s.peaks + h);
    rescale.store(s.rescale + h);
    multiply_add(Vec::load(s.totals + h), rescale, sum).store(s.totals + h);
  }
}

// values[head] = values[head] * rescale[head] + sum over keys of scores[key][head] * keys[key],
// two vectors of channels.
template <int heads>
void add_values(const AttentionScratch& s, int64_t count, int64_t head, int64_t channel) {
  constexpr int lanes = Vec::lanes;
  Vec sum[heads][2];
  DSV4_UNROLL
  for (int h = 0; h < heads; ++h) {
    const float* from = s.values + (head + h) * s.row_stride + channel;
    const Vec factor = Vec::broadcast(s.rescale[head + h]);
    sum[h][0] = Vec::load(from) * factor;
    sum[h][1] = Vec::load(from + lanes) * factor;
  }
  const float* key = s.keys + channel;
  const float* p = s.scores + head;
  for (int64_t k = 0; k < count; ++k) {
    const Vec low = Vec::load(key), high = Vec::load(key + lanes);
    DSV4_UNROLL
    for (int h = 0; h < heads; ++h) {
      const Vec weight = Vec::broadcast(p[h]);
      sum[h][0] = multiply_add(weight, low, sum[h][0]);
      sum[h][1] = multiply_add(weight, high, sum[h][1]);
    }
    key += s.row_stride;
    p += s.heads;
  }
  DSV4_UNROLL
  for (int h = 0; h < heads; ++h) {
    float* to = s.values + (head + h) * s.row_stride + channel;
    sum[h][0].store(to);
    sum[h][1].store(to + lanes);
  }
}

inline void add_all_values(const AttentionScratch& s, int64_t count, int64_t heads,
                           int64_t channels) {
  for (int64_t c = 0; c < channels; c += 2 * Vec::lanes) {
    int64_t h = 0;
    // Twice 4 rather than a full block and a rest of few registers.
    for (; heads - h >= kBlockRows && heads - h != 8; h += kBlockRows) {
      add_values<kBlockRows>(s, count, h, c);
    }
    for (; heads - h >= 4; h += 4) add_values<4>(s, count, h, c);
    for (; h < heads; ++h) add_values<1>(s, count, h, c);
  }
}

template <class X>
void finish_heads(const dsv4::cpu::SparseAttention& call, const AttentionScratch& s, int64_t token,
                  int64_t first, int64_t heads) {
  auto* out = reinterpret_cast<X*>(call.out) + (token * call.heads + first) * call.channels;
  for (int64_t h = 0; h < heads; ++h) {
    float total = s.totals[h];
    if (!call.sink_first && total != 0) {
      total += __builtin_expf(call.sink[(first + h) * call.sink_stride] - s.peaks[h]);
    }
    // Without a key there is no total, and the result is 0.
    const float share = total == 0 ? 0 : 1 / total;
    const Vec factor = Vec::broadcast(share);
    const float* from = s.values + h * s.row_stride;
    X* to = out + h * call.channels;
    for (int64_t c = 0; c < call.channels; c += Vec::lanes) {
      store_first(Vec::load(from + c) * factor, to + c, call.channels - c);
    }
  }
}

template <class X>
void attend(const dsv4::cpu::SparseAttention& call, int64_t token, int64_t first, int64_t heads,
            float* memory) {
  const AttentionScratch s(heads, call.channels, call.tile, memory);
  const int64_t padded = s.row_stride - 16;
  const char* q = call.q + token * call.q_token_stride + first * call.q_head_stride;
  pack_heads(reinterpret_cast<const X*>(q), call.q_head_stride / static_cast<int64_t>(sizeof(X)),
             heads, call.channels, s.panels);
  for (int64_t h = 0; h < s.heads; ++h) {
    const bool sink = call.sink_first && h < heads;
    s.peaks[h] = sink ? call.sink[(first + h) * call.sink_stride] : kLowest;
    s.totals[h] = sink ? 1.0f : 0.0f;
  }
  __builtin_memset(s.values, 0, static_cast<size_t>(s.heads * s.row_stride) * sizeof(float));
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(call.channels));
  dsv4::cpu::KeyList list(call, token);
  const char* rows[2][dsv4::cpu::kAscendTile];
  int64_t count = list.next(rows[0]);
  for (int tile = 0; count > 0; tile ^= 1) {
    for (int64_t k = 0; k < count; ++k) {
      widen_row(reinterpret_cast<const X*>(rows[tile][k]), call.channels, s.keys + k * s.row_stride,
                padded);
    }
    const int64_t next = list.next(rows[tile ^ 1]);
    prefetch_rows(rows[tile ^ 1], next, call.channels * static_cast<int64_t>(sizeof(X)));
    multiply_keys(s.keys, count, s.row_stride, s.panels, s.heads, call.channels, s.scores, s.heads);
    soften<X>(s, count, scale);
    add_all_values(s, count, heads, call.channels);
    count = next;
  }
  finish_heads<X>(call, s, token, first, heads);
}

void attend_heads(const dsv4::cpu::SparseAttention& call, int64_t token, int64_t first,
                  int64_t heads, float* memory) {
  DSV4_FOR_DTYPE(call.dtype, attend, call, token, first, heads, memory);
}
