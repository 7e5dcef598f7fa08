// Products of rows with the rows of a matrix.
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
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec w = Vec::load(weight + r * weight_stride + i);
      DSV4_UNROLL
      for (int t = 0; t < tokens; ++t) {
        total[r * tokens + t] =
            multiply_add(Vec::load(x + t * x_stride + i), w, total[r * tokens + t]);
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

// Widens a row to fp32.
template <class X>
void widen_row(const X* x, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    Vec::load(x + i).store(to + i);
  }
  store_first(load_first(x + i, width - i), to + i, width - i);
}
