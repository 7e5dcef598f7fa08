// Rows of RMSNorm with a rounding at every step, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

template <class X>
float round_once(float value) {
  return dsv4::to_float(dsv4::from_float<X>(value));
}

template <class X>
float sum_of_rounded_squares(const X* x, int64_t width) {
  Vec sums[2] = {Vec::broadcast(0), Vec::broadcast(0)};
  int64_t i = 0;
  for (; i + 2 * Vec::lanes <= width; i += 2 * Vec::lanes) {
    DSV4_UNROLL
    for (int k = 0; k < 2; ++k) {
      const Vec value = Vec::load(x + i + k * Vec::lanes);
      sums[k] = sums[k] + rounded<X>(value * value);
    }
  }
  for (; i < width; i += Vec::lanes) {
    const Vec value = load_first(x + i, width - i);
    sums[0] = sums[0] + rounded<X>(value * value);
  }
  return (sums[0] + sums[1]).sum();
}

template <class X>
void head_rms_norm_typed(const dsv4::cpu::HeadRmsNorm& call, int64_t begin, int64_t end) {
  const int64_t width = call.x_rows.width();
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(call.x) + call.x_rows.offset(row);
    X* y = static_cast<X*>(call.y) + row * width;
    const float mean = round_once<X>(sum_of_rounded_squares(x, width) / static_cast<float>(width));
    const float shifted = round_once<X>(mean + call.eps);
    const Vec root = Vec::broadcast(round_once<X>(1.0f / __builtin_sqrtf(shifted)));
    for (int64_t i = 0; i < width; i += Vec::lanes) {
      store_first(load_first(x + i, width - i) * root, y + i, width - i);
    }
  }
}

void head_rms_norm_rows(const dsv4::cpu::HeadRmsNorm& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, head_rms_norm_typed, call, begin, end);
}
