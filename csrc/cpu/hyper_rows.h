// Tokens of hyper-connections, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

constexpr int kStreams = static_cast<int>(dsv4::cpu::kMostStreams);
constexpr int kMixes = kStreams * (kStreams + 2);
constexpr int kTile = 4;             // tokens that share what is read of fn
constexpr int64_t kChannels = 2048;  // of a tile in fp32 that stay in the first cache

// Channels [first, first + width) of a token's streams end to end, in fp32.
template <class X>
void widen(const dsv4::cpu::HyperMix& call, int64_t token, int64_t first, int64_t width,
           float* to) {
  const int64_t d = call.x_rows.width();
  while (width > 0) {
    const int64_t stream = first / d, channel = first % d;
    const int64_t count = d - channel < width ? d - channel : width;
    const X* x =
        static_cast<const X*>(call.x) + call.x_rows.offset(token * call.streams + stream) + channel;
    widen_row(x, count, to);
    first += count, to += count, width -= count;
  }
}

// mix[r * lanes + t] of `tokens` tokens: the products, scaled by the norm.
template <class X, int tokens>
void mix_tile(const dsv4::cpu::HyperMix& call, int64_t token, int rows, float* mix) {
  const int64_t all = call.streams * call.x_rows.width();
  float x[tokens * kChannels];
  Vec sums[kMixes * tokens];
  Vec squares[4 * tokens];
  for (int k = 0; k < rows * tokens; ++k) {
    sums[k] = Vec::broadcast(0);
  }
  for (Vec& sum : squares) {
    sum = Vec::broadcast(0);
  }
  for (int64_t first = 0; first < all; first += kChannels) {
    const int64_t width = all - first < kChannels ? all - first : kChannels;
    for (int t = 0; t < tokens; ++t) {
      widen<X>(call, token + t, first, width, x + t * kChannels);
      add_squares(x + t * kChannels, width, squares + 4 * t);
    }
    add_all_products<tokens>(x, kChannels, call.fn + first, call.fn_stride, rows, width, sums);
  }
  for (int t = 0; t < tokens; ++t) {
    const float sum = sum_of_four(squares + 4 * t);
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(all) + call.norm_eps);
    for (int r = 0; r < rows; ++r) {
      mix[r * Vec::lanes + t] = sums[r * tokens + t].sum() * scale;
    }
  }
}

// mix * scale + base of a row, tokens in the lanes.
inline Vec logit(const dsv4::cpu::HyperMix& call, const float* mix, int64_t row, int64_t scale) {
  return multiply_add(Vec::load(mix + row * Vec::lanes),
                      Vec::broadcast(call.scale[scale * call.scale_stride]),
                      Vec::broadcast(call.base[row * call.base_stride]));
}

// comb[j * n + k] / (sum + eps) over all k of every j, or over all j of every k.
inline void normalise(Vec* comb, int n, int step, int other, Vec eps) {
  for (int j = 0; j < n; ++j) {
    Vec sum = comb[j * other];
    for (int k = 1; k < n; ++k) {
      sum = sum + comb[j * other + k * step];
    }
    sum = sum + eps;
    for (int k = 0; k < n; ++k) {
      comb[j * other + k * step] = comb[j * other + k * step] / sum;
    }
  }
}

// Of any number of streams: comb[j * n + k], tokens in the lanes.
inline void sinkhorn(Vec* comb, int n, int64_t rounds, float hc_eps) {
  const Vec eps = Vec::broadcast(hc_eps);
  for (int j = 0; j < n; ++j) {
    Vec* row = comb + j * n;
    Vec most = row[0];
    for (int k = 1; k < n; ++k) {
      most = max(row[k], most);
    }
    Vec sum = Vec::broadcast(0);
    for (int k = 0; k < n; ++k) {
      row[k] = exp(row[k] - most);
      sum = sum + row[k];
    }
    for (int k = 0; k < n; ++k) {
      row[k] = row[k] / sum + eps;
    }
  }
  normalise(comb, n, n, 1, eps);
  for (int64_t round = 1; round < rounds; ++round) {
    normalise(comb, n, 1, n, eps);
    normalise(comb, n, n, 1, eps);
  }
}

constexpr int kFours = 16 / Vec::lanes;  // vectors of a 4 x 4 matrix

inline Vec row_sums(Vec rows) {
  const Vec pairs = rows + exchange<1>(rows);
  return pairs + exchange<2>(pairs);
}

inline void divide_columns(Vec* comb, Vec eps) {
  Vec sum = comb[0];
  for (int i = 1; i < kFours; ++i) {
    sum = sum + comb[i];
  }
  sum = sum + exchange<4>(sum);
  if constexpr (Vec::lanes > 8) {
    sum = sum + exchange<8>(sum);
  }
  for (int i = 0; i < kFours; ++i) {
    comb[i] = comb[i] / (sum + eps);
  }
}

// Of 4 streams and one token, in place: the matrix in the lanes.
inline void sinkhorn_of_four(float* matrix, int64_t rounds, float hc_eps) {
  const Vec eps = Vec::broadcast(hc_eps);
  Vec comb[kFours];
  for (int i = 0; i < kFours; ++i) {
    const Vec logits = Vec::load(matrix + i * Vec::lanes);
    const Vec pairs = max(logits, exchange<1>(logits));
    const Vec powers = exp(logits - max(pairs, exchange<2>(pairs)));
    comb[i] = powers / row_sums(powers) + eps;
  }
  divide_columns(comb, eps);
  for (int64_t round = 1; round < rounds; ++round) {
    for (int i = 0; i < kFours; ++i) {
      comb[i] = comb[i] / (row_sums(comb[i]) + eps);
    }
    divide_columns(comb, eps);
  }
  for (int i = 0; i < kFours; ++i) {
    comb[i].store(matrix + i * Vec::lanes);
  }
}

// values[r], tokens in the lanes, to to[t * rows + r] of `tokens` tokens.
inline void scatter(const Vec* values, int rows, int64_t tokens, float* to) {
  for (int r = 0; r < rows; ++r) {
    float lane[Vec::lanes];
    values[r].store(lane);
    for (int64_t t = 0; t < tokens; ++t) {
      to[t * rows + r] = lane[t];
    }
  }
}

template <class X>
void collapse(const dsv4::cpu::HyperMix& call, int64_t token, const float* pre) {
  const int64_t d = call.x_rows.width();
  const X* x[kStreams];
  for (int64_t j = 0; j < call.streams; ++j) {
    x[j] = static_cast<const X*>(call.x) + call.x_rows.offset(token * call.streams + j);
  }
  X* y = static_cast<X*>(call.y) + token * d;
  for (int64_t i = 0; i < d; i += Vec::lanes) {
    const int64_t count = d - i;
    Vec sum = Vec::broadcast(pre[0]) * load_first(x[0] + i, count);
    for (int64_t j = 1; j < call.streams; ++j) {
      sum = multiply_add(Vec::broadcast(pre[j]), load_first(x[j] + i, count), sum);
    }
    store_first(sum, y + i, count);
  }
}

template <class X>
void mix_typed(const dsv4::cpu::HyperMix& call, int64_t begin, int64_t end) {
  const int n = static_cast<int>(call.streams);
  const int rows = call.comb == nullptr ? n : n * (n + 2);
  for (int64_t first = begin; first < end; first += Vec::lanes) {
    const int64_t tokens = end - first < Vec::lanes ? end - first : Vec::lanes;
    float mix[kMixes * Vec::lanes] = {};
    int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile) {
      mix_tile<X, kTile>(call, first + t, rows, mix + t);
    }
    for (; t < tokens; ++t) {
      mix_tile<X, 1>(call, first + t, rows, mix + t);
    }
    Vec weights[kStreams * kStreams];
    for (int j = 0; j < n; ++j) {
      weights[j] = sigmoid(logit(call, mix, j, 0)) + Vec::broadcast(call.hc_eps);
    }
    float pre[kStreams * Vec::lanes];
    scatter(weights, n, tokens, pre);
    for (t = 0; t < tokens; ++t) {
      collapse<X>(call, first + t, pre + t * n);
    }
    if (call.comb == nullptr) {
      continue;
    }
    for (int j = 0; j < n; ++j) {
      weights[j] = Vec::broadcast(2) * sigmoid(logit(call, mix, n + j, 1));
    }
    scatter(weights, n, tokens, call.post + first * n);
    for (int j = 0; j < n * n; ++j) {
      weights[j] = logit(call, mix, 2 * n + j, 2);
    }
    float* comb = call.comb + first * n * n;
    if (n != 4) {
      sinkhorn(weights, n, call.rounds, call.hc_eps);
    }
    scatter(weights, n * n, tokens, comb);
    for (t = 0; t < tokens && n == 4; ++t) {
      sinkhorn_of_four(comb + t * 16, call.rounds, call.hc_eps);
    }
  }
}

void mix_rows(const dsv4::cpu::HyperMix& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, mix_typed, call, begin, end);
}

template <class X, int fixed>
void post_token(const dsv4::cpu::HyperPost& call, int64_t token) {
  const int n = fixed > 0 ? fixed : static_cast<int>(call.streams);
  const int64_t d = call.x_rows.width();
  const X* z = static_cast<const X*>(call.z) + call.z_rows.offset(token);
  const X* x[kStreams];
  float post[kStreams];
  float comb[kStreams * kStreams];
  for (int j = 0; j < n; ++j) {
    x[j] = static_cast<const X*>(call.x) + call.x_rows.offset(token * n + j);
    post[j] = call.post[token * call.post_strides[0] + j * call.post_strides[1]];
    for (int k = 0; k < n; ++k) {
      comb[j * n + k] = call.comb[token * call.comb_strides[0] + j * call.comb_strides[1] +
                                  k * call.comb_strides[2]];
    }
  }
  X* y = static_cast<X*>(call.y) + token * n * d;
  for (int64_t i = 0; i < d; i += Vec::lanes) {
    const int64_t count = d - i;
    const Vec output = load_first(z + i, count);
    Vec stream[fixed > 0 ? fixed : kStreams] = {};
    DSV4_UNROLL
    for (int j = 0; j < n; ++j) {
      stream[j] = load_first(x[j] + i, count);
    }
    for (int k = 0; k < n; ++k) {
      Vec sum = Vec::broadcast(post[k]) * output;
      DSV4_UNROLL
      for (int j = 0; j < n; ++j) {
        sum = multiply_add(Vec::broadcast(comb[j * n + k]), stream[j], sum);
      }
      store_first(sum, y + k * d + i, count);
    }
  }
}

template <class X>
void post_typed(const dsv4::cpu::HyperPost& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (call.streams == 4) {
      post_token<X, 4>(call, token);
    } else {
      post_token<X, 0>(call, token);
    }
  }
}

void post_rows(const dsv4::cpu::HyperPost& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, post_typed, call, begin, end);
}
