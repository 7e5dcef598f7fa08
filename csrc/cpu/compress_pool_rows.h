// Projections and pooling of the compressor over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

// Tokens whose fp32 channels stay in the second-level cache.
constexpr int64_t kTokensAtOnce = 16;
// Rows of a weight that meet four tokens: of AVX-512's 32 registers, or of 16.
constexpr int kTileRows = Vec::lanes == 16 ? 6 : 3;

// Rows `first` .. first + rows - 1 of a weight for some tokens, into their state rows.
template <int tokens, int rows, class W>
void project_block(const dsv4::cpu::CompressPool& call, const float* x,
                   const dsv4::cpu::StateRow* to, bool gates, int64_t first) {
  const dsv4::cpu::ProjectionWeight& weight = gates ? call.gate : call.value;
  const int64_t stride = weight.row_stride / static_cast<int64_t>(sizeof(W));
  const W* w = reinterpret_cast<const W*>(weight.data) + first * stride;
  Vec sums[rows * tokens];
  for (Vec& sum : sums) sum = Vec::broadcast(0.0f);
  add_products<tokens, rows>(x, call.channels, w, stride, call.channels, sums);
  for (int t = 0; t < tokens; ++t) {
    if (to[t].row == nullptr) {
      continue;
    }
    float* row = to[t].row + (gates ? call.width : 0) + first;
    for (int r = 0; r < rows; ++r) {
      const float dot = sums[r * tokens + t].sum();
      row[r] = gates ? dot + to[t].ape[first + r] : dot;
    }
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
        project_rows<4, kTileRows, W>(call, x + t * call.channels, to + t, gates, row, last);
      }
      for (; t < after; ++t) {
        project_rows<1, 6, W>(call, x + t * call.channels, to + t, gates, row, last);
      }
    }
  }
}

void project_part(const dsv4::cpu::CompressPool& call, const float* x,
                  const dsv4::cpu::StateRow* to, int64_t tokens, bool gates, int64_t begin,
                  int64_t end) {
  DSV4_FOR_DTYPE((gates ? call.gate : call.value).dtype, project_tokens, call, x, to, tokens, gates,
                 begin, end);
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
    project_part(call, x, to, tokens, gates, low, high);
  }
}

template <class X>
void widen_rows(const dsv4::cpu::CompressPool& call, int64_t first, int64_t tokens, float* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* from = reinterpret_cast<const X*>(call.x + (first + t) * call.x_stride);
    widen_row(from, call.channels, to + t * call.channels);
  }
}

// Tokens of x from `first` on as fp32 [tokens, channels].
void widen_tokens(const dsv4::cpu::CompressPool& call, int64_t first, int64_t tokens, float* to) {
  DSV4_FOR_DTYPE(call.dtype, widen_rows, call, first, tokens, to);
}

template <class X>
void pool(const dsv4::cpu::CompressPool& call, const float* const* slots, int64_t count,
          int64_t entry) {
  X* out = reinterpret_cast<X*>(call.entries) + entry * call.head_dim;
  for (int64_t c = 0; c < call.head_dim; c += Vec::lanes) {
    const int64_t rest = call.head_dim - c;
    Vec peak = Vec::broadcast(kLowest);
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
  DSV4_FOR_DTYPE(call.dtype, pool, call, slots, count, entry);
}
