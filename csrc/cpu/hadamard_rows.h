// Rows of the Hadamard rotation, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

// Sums and differences of lanes `distance` apart.
template <int distance>
Vec butterfly(Vec a) {
  float sign[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) {
    sign[i] = (i & distance) == 0 ? 1.0f : -1.0f;
  }
  return multiply_add(a, Vec::load(sign), exchange<distance>(a));
}

// The rotation inside a vector, of the first n lanes if there are fewer than lanes.
inline Vec rotate_lanes(Vec a, int64_t n) {
  a = a + Vec::broadcast(0.0f);  // sums that start at 0 give no -0
  if (n > 1) {
    a = butterfly<1>(a);
  }
  if (n > 2) {
    a = butterfly<2>(a);
  }
  if (n > 4) {
    a = butterfly<4>(a);
  }
  if constexpr (Vec::lanes > 8) {
    if (n > 8) {
      a = butterfly<8>(a);
    }
  }
  return a;
}

template <class X>
void rotate_row(const X* x, int64_t n, float factor, float* wide, X* y) {
  const Vec scale = Vec::broadcast(factor);
  if (n <= Vec::lanes) {
    store_first(rotate_lanes(load_first(x, n), n) * scale, y, n);
    return;
  }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    rotate_lanes(Vec::load(x + i), n).store(wide + i);
  }
  for (int64_t half = Vec::lanes; half < n; half *= 2) {
    for (int64_t first = 0; first < n; first += 2 * half) {
      for (int64_t i = first; i < first + half; i += Vec::lanes) {
        const Vec a = Vec::load(wide + i), b = Vec::load(wide + i + half);
        (a + b).store(wide + i);
        (a - b).store(wide + i + half);
      }
    }
  }
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    (Vec::load(wide + i) * scale).store(y + i);
  }
}

template <class X>
void hadamard_typed(const dsv4::cpu::Hadamard& call, int64_t begin, int64_t end) {
  const int64_t n = call.x_rows.width();
  auto* wide = static_cast<float*>(dsv4::cpu::scratch(static_cast<size_t>(n) * sizeof(float)));
  const double root = call.scaled ? __builtin_sqrt(static_cast<double>(n)) : 1.0;
  for (int64_t row = begin; row < end; ++row) {
    rotate_row(static_cast<const X*>(call.x) + call.x_rows.offset(row), n,
               static_cast<float>(1.0 / root), wide, static_cast<X*>(call.y) + row * n);
  }
}

void hadamard_rows(const dsv4::cpu::Hadamard& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, hadamard_typed, call, begin, end);
}
