// Projections and pooling of the compressor over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// header of its products.

#include "cpu/key_products.h"

// Tokens whose fp32 channels stay in the second-level cache.
constexpr int64_t kTokensAtOnce = 16;

// dots[t][r] = x[t] . w[r]: one vector of partial sums each, whatever the block.
template <int tokens, int rows, class W>
void dot_block(const float* x, int64_t x_stride, const W* const* w, int64_t channels,
               float (&dots)[tokens][rows]) {
  constexpr int lanes = Vec::lanes;
  Vec sum[tokens][rows];
  DSV4_UNROLL
  for (int t = 0; t < tokens; ++t) {
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) sum[t][r] = Vec::broadcast(0.0f);
  }
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    Vec weight[rows];
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) weight[r] = Vec::load(w[r] + c);
    DSV4_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const Vec value = Vec::load(x + t * x_stride + c);
      DSV4_UNROLL
      for (int r = 0; r < rows; ++r) sum[t][r] = multiply_add(value, weight[r], sum[t][r]);
    }
  }
  if (c < channels) {
    for (int r = 0; r < rows; ++r) {
      const Vec weight = load_first(w[r] + c, channels - c);
      for (int t = 0; t < tokens; ++t) {
        sum[t][r] = multiply_add(load_first(x + t * x_stride + c, channels - c), weight, sum[t][r]);
      }
    }
  }
  DSV4_UNROLL
  for (int t = 0; t < tokens; ++t) {
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) dots[t][r] = sum[t][r].sum();
  }
}

// Rows `first` .. first + rows - 1 of a weight for some tokens, into their state rows.
template <int tokens, int rows, class W>
void project_block(const dsv4::cpu::CompressPool& call, const float* x,
                   const dsv4::cpu::StateRow* to, bool gates, int64_t first) {
  const dsv4::cpu::ProjectionWeight& weight = gates ? call.gate : call.value;
  const W* w[rows];
  for (int r = 0; r < rows; ++r) {
    w[r] = reinterpret_cast<const W*>(weight.data + (first + r) * weight.row_stride);
  }
  float dots[tokens][rows];
  dot_block<tokens, rows, W>(x, call.channels, w, call.channels, dots);
  for (int t = 0; t < tokens; ++t) {
    if (to[t].row == nullptr) {
      continue;
    }
    float* row = to[t].row + (gates ? call.width : 0) + first;
    for (int r = 0; r < rows; ++r) row[r] = gates ? dots[t][r] + to[t].ape[first + r] : dots[t][r];
  }
}

template <int tokens, int rows, class W>
void project_rows(const dsv4::cpu::CompressPool& call, const float* x,
                  const dsv4::cpu::StateRow* to, bool gates, int64_t begin, int64_t end) {
  for (; begin + rows <= end; begin += rows) {
    project_block<tokens, rows, W>(call, x, to, gates, begin);
  }
  for (; begin < end; ++begin) project_block<tokens, 1, W>(call, x, to, gates, begin);
}

template <class W>
void project_tokens(const dsv4::cpu::CompressPool& call, const float* x,
                    const dsv4::cpu::StateRow* to, int64_t tokens, bool gates, int64_t begin,
                    int64_t end) {
  constexpr int64_t kRows = 6;  // of a weight, that stay in the first-level cache meanwhile
  for (int64_t some = 0; some < tokens; some += kTokensAtOnce) {
    const int64_t after = some + kTokensAtOnce < tokens ? some + kTokensAtOnce : tokens;
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t last = row + kRows < end ? row + kRows : end;
      int64_t t = some;
      for (; t + 4 <= after; t += 4) {
        project_rows<4, 3, W>(call, x + t * call.channels, to + t, gates, row, last);
      }
      for (; t < after; ++t) {
        project_rows<1, 6, W>(call, x + t * call.channels, to + t, gates, row, last);
      }
    }
  }
}

// Rows begin .. end - 1 of both weights, the values' first, for `tokens` tokens.
// x: fp32 [tokens, channels].
void project_weight_rows(const dsv4::cpu::CompressPool& call, const float* x,
                         const dsv4::cpu::StateRow* to, int64_t tokens, int64_t begin,
                         int64_t end) {
  for (const bool gates : {false, true}) {
    const int64_t offset = gates ? call.width : 0;
    const int64_t low = begin > offset ? begin - offset : 0;
    const int64_t high = end - offset < call.width ? end - offset : call.width;
    switch ((gates ? call.gate : call.value).dtype) {
      case dsv4::DType::f32:
        project_tokens<float>(call, x, to, tokens, gates, low, high);
        break;
      case dsv4::DType::bf16:
        project_tokens<dsv4::BFloat16>(call, x, to, tokens, gates, low, high);
        break;
      case dsv4::DType::f16:
        project_tokens<dsv4::Half>(call, x, to, tokens, gates, low, high);
        break;
    }
  }
}

template <class X>
void widen_rows(const dsv4::cpu::CompressPool& call, int64_t first, int64_t tokens, float* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* from = reinterpret_cast<const X*>(call.x + (first + t) * call.x_stride);
    for (int64_t c = 0; c < call.channels; c += Vec::lanes) {
      store_first(load_first(from + c, call.channels - c), to + t * call.channels + c,
                  call.channels - c);
    }
  }
}

// Tokens of x from `first` on as fp32 [tokens, channels].
void widen_tokens(const dsv4::cpu::CompressPool& call, int64_t first, int64_t tokens, float* to) {
  switch (call.dtype) {
    case dsv4::DType::f32:
      return widen_rows<float>(call, first, tokens, to);
    case dsv4::DType::bf16:
      return widen_rows<dsv4::BFloat16>(call, first, tokens, to);
    case dsv4::DType::f16:
      return widen_rows<dsv4::Half>(call, first, tokens, to);
  }
}

template <class X>
void pool(const dsv4::cpu::CompressPool& call, const float* const* slots, int64_t count, X* out) {
  for (int64_t c = 0; c < call.head_dim; c += Vec::lanes) {
    const int64_t rest = call.head_dim - c;
    Vec peak = Vec::broadcast(-3.40282347e38f);
    for (int64_t i = 0; i < count; ++i) {
      peak = max(load_first(slots[i] + call.width + c, rest), peak);
    }
    Vec total = Vec::broadcast(0.0f), sum = Vec::broadcast(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Vec p = exp(load_first(slots[i] + call.width + c, rest) - peak);
      total = total + p;
      sum = multiply_add(p, load_first(slots[i] + c, rest), sum);
    }
    store_first(sum / total, out + c, rest);
  }
}

// One entry from the values of its slots, behind each of which are `width` channels on its scores;
// at least one slot.
void pool_entry(const dsv4::cpu::CompressPool& call, const float* const* slots, int64_t count,
                int64_t entry) {
  const int64_t at = entry * call.head_dim;
  switch (call.dtype) {
    case dsv4::DType::f32:
      return pool(call, slots, count, reinterpret_cast<float*>(call.entries) + at);
    case dsv4::DType::bf16:
      return pool(call, slots, count, reinterpret_cast<dsv4::BFloat16*>(call.entries) + at);
    case dsv4::DType::f16:
      return pool(call, slots, count, reinterpret_cast<dsv4::Half*>(call.entries) + at);
  }
}
