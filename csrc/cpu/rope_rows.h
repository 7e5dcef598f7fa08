// Rows of the rotary embedding, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

template <class X>
void rotate_row(X* x, const float* cos, const float* sin, int64_t width) {
  // The first of a pair takes minus the second times the sine.
  float sign[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) {
    sign[i] = i % 2 == 0 ? -1.0f : 1.0f;
  }
  const Vec signs = Vec::load(sign);
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    const int64_t count = width - i;
    const Vec value = load_first(x + i, count);
    const Vec turned = exchange<1>(value) * signs;
    store_first(value * load_first(cos + i, count) + turned * load_first(sin + i, count), x + i,
                count);
  }
}

template <class X>
void rotate_typed(const dsv4::cpu::ApplyRope& call, int64_t begin, int64_t end) {
  const int64_t kept = call.x_rows.width() - call.width;
  const int64_t rows_of_token = call.x_rows.count() / call.tokens;
  auto* x = static_cast<X*>(call.x);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / rows_of_token;
    rotate_row(x + call.x_rows.offset(row) + kept, call.cos + token * call.cos_stride,
               call.sin + token * call.sin_stride, call.width);
  }
}

void rotate_rows(const dsv4::cpu::ApplyRope& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, rotate_typed, call, begin, end);
}

template <class X>
void copy_typed(const dsv4::cpu::Rope& call, int64_t begin, int64_t end) {
  const int64_t width = call.x_rows.width();
  for (int64_t row = begin; row < end; ++row) {
    __builtin_memcpy(static_cast<X*>(call.y) + row * width,
                     static_cast<const X*>(call.x) + call.x_rows.offset(row),
                     static_cast<size_t>(width) * sizeof(X));
  }
}

void copy_rows(const dsv4::cpu::Rope& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, copy_typed, call, begin, end);
}
