// The rows of RMSNorm over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

template <class X>
float sum_of_squares(const X* x, int64_t width) {
  Vec sums[4] = {Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0)};
  add_squares(x, width, sums);
  return sum_of_four(sums);
}

template <class X, class W>
void normalize_row(const X* x, const W* weight, float eps, X* y, int64_t width) {
  const float mean = sum_of_squares(x, width) / static_cast<float>(width);
  const Vec scale = Vec::broadcast(1.0f / __builtin_sqrtf(mean + eps));
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    (Vec::load(x + i) * scale * Vec::load(weight + i)).store(y + i);
  }
  const int64_t rest = width - i;
  store_first(load_first(x + i, rest) * scale * load_first(weight + i, rest), y + i, rest);
}

template <class X>
struct RowsOf {
  template <class W>
  static void normalize(const dsv4::cpu::RmsNorm& call, int64_t begin, int64_t end) {
    const auto* x = static_cast<const X*>(call.x);
    const auto* weight = static_cast<const W*>(call.weight);
    auto* y = static_cast<X*>(call.y);
    for (int64_t row = begin; row < end; ++row) {
      normalize_row(x + call.x_rows.offset(row), weight, call.eps, y + call.y_rows.offset(row),
                    call.x_rows.width());
    }
  }
};

template <class X>
void with_weight_type(const dsv4::cpu::RmsNorm& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.weight_dtype, RowsOf<X>::template normalize, call, begin, end);
}

void rms_norm_rows(const dsv4::cpu::RmsNorm& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, with_weight_type, call, begin, end);
}
