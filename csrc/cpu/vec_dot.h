// Products of rows with the rows of a matrix and with themselves, and rows as fp32.
// Included by foreach_isa.h after vec_math.h, so it includes nothing and has no guard.

// sums[r * tokens + t] += x[t] . weight[r] of `width` adjacent channels. One chain of sums for
// every pair, whatever the tile: the bits of a token do not depend on its neighbours.
template <int tokens, int rows, class W>
void add_products(const float* x, int64_t x_stride, const W* weight, int64_t weight_stride,
                  int64_t width, Vec* sums) {
  Vec total[rows * tokens];
  DSV4_UNROLL
  for (int k = 0; k < rows * tokens; ++k) {
    total[k] = sums[k];
  }
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    Vec w[rows];
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) w[r] = Vec::load(weight + r * weight_stride + i);
    DSV4_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const Vec value = Vec::load(x + t * x_stride + i);
      DSV4_UNROLL
      for (int r = 0; r < rows; ++r) {
        total[r * tokens + t] = multiply_add(value, w[r], total[r * tokens + t]);
      }
    }
  }
  for (int k = 0; k < rows * tokens && i < width; ++k) {
    const Vec w = load_first(weight + k / tokens * weight_stride + i, width - i);
    const Vec value = load_first(x + k % tokens * x_stride + i, width - i);
    total[k] = multiply_add(value, w, total[k]);
  }
  DSV4_UNROLL
  for (int k = 0; k < rows * tokens; ++k) {
    sums[k] = total[k];
  }
}

// The same of any number of rows, as many at a time as registers hold.
template <int tokens, class W>
void add_all_products(const float* x, int64_t x_stride, const W* weight, int64_t weight_stride,
                      int64_t rows, int64_t width, Vec* sums) {
  constexpr int step = 8 / tokens;
  int64_t r = 0;
  for (; r + step <= rows; r += step) {
    add_products<tokens, step>(x, x_stride, weight + r * weight_stride, weight_stride, width,
                               sums + r * tokens);
  }
  for (; r < rows; ++r) {
    add_products<tokens, 1>(x, x_stride, weight + r * weight_stride, weight_stride, width,
                            sums + r * tokens);
  }
}

// Adds the squares of a row to four sums.
template <class X>
void add_squares(const X* x, int64_t width, Vec* sums) {
  int64_t i = 0;
  for (; i + 4 * Vec::lanes <= width; i += 4 * Vec::lanes) {
    DSV4_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Vec value = Vec::load(x + i + k * Vec::lanes);
      sums[k] = multiply_add(value, value, sums[k]);
    }
  }
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    const Vec value = Vec::load(x + i);
    sums[0] = multiply_add(value, value, sums[0]);
  }
  const Vec rest = load_first(x + i, width - i);
  sums[1] = multiply_add(rest, rest, sums[1]);
}

inline float sum_of_four(const Vec* sums) {
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

// Widens a row to fp32.
template <class X>
void widen_row(const X* x, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    Vec::load(x + i).store(to + i);
  }
  store_first(load_first(x + i, width - i), to + i, width - i);
}

// The same with zeros behind it, up to `padded` elements.
template <class X>
void widen_row(const X* x, int64_t width, float* to, int64_t padded) {
  widen_row(x, width, to);
  __builtin_memset(to + width, 0, static_cast<size_t>(padded - width) * sizeof(float));
}
