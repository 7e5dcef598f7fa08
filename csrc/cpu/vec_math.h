// What every vector type can do beyond its own file: the ends of rows, and exponentials.
// Included by foreach_isa.h after a `Vec`, inside its namespace, so it includes nothing and has no
// guard.

// The ends of rows are apart, so that whole vectors need no call.
template <class T>
__attribute__((noinline)) Vec load_end(const T* from, int64_t count) {
  T element[Vec::lanes] = {};
  __builtin_memcpy(element, from, static_cast<size_t>(count) * sizeof(T));
  return Vec::load(element);
}

template <class V, class T>
__attribute__((noinline)) void store_end(V value, T* to, int64_t count) {
  T element[Vec::lanes];
  value.store(element);
  __builtin_memcpy(to, element, static_cast<size_t>(count) * sizeof(T));
}

// The first `count` elements of a row, at most a vector; the lanes beyond are 0.
template <class T>
inline Vec load_first(const T* from, int64_t count) {
  return count >= Vec::lanes ? Vec::load(from) : load_end(from, count);
}

// Writes the first `count` lanes, at most a vector.
template <class T>
inline void store_first(Vec value, T* to, int64_t count) {
  count >= Vec::lanes ? value.store(to) : store_end(value, to, count);
}

// The same as bytes.
inline void store_first(VecInt value, uint8_t* to, int64_t count) {
  count >= Vec::lanes ? value.store(to) : store_end(value, to, count);
}

// Rounded to T and back; every NaN stays one.
template <class T>
inline Vec rounded(Vec value) {
  T element[Vec::lanes];
  value.store(element);
  return Vec::load(element);
}
template <>
inline Vec rounded<float>(Vec value) {
  return value;
}
// Without leaving the registers.
template <>
inline Vec rounded<dsv4::BFloat16>(Vec value) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
  typedef float Floats __attribute__((vector_size(sizeof(Vec))));
  const Bits bits = __builtin_bit_cast(Bits, value);
  const Floats floats = __builtin_bit_cast(Floats, value);
  const Bits near = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return __builtin_bit_cast(Vec, near | __builtin_bit_cast(Bits, floats != floats));
}

constexpr float kLowest = -3.40282347e38f;  // below every score, and finite: minus itself it is 0

// e^x within 2 units of the last place; 0 below -87.3, infinity above 88.7, NaN of NaN.
inline Vec exp(Vec x) {
  const Vec bounded = min(max(x, Vec::broadcast(-104.0f)), Vec::broadcast(89.0f));
  const Vec n = round_even(bounded * Vec::broadcast(1.44269504f));
  // ln 2 in two parts: the first has few bits, so that n times it is exact.
  Vec r = multiply_add(n, Vec::broadcast(-0.693359375f), bounded);
  r = multiply_add(n, Vec::broadcast(2.12194440e-4f), r);
  // e^r of |r| <= ln 2 / 2: the Taylor series to r^7, the rest is below 2^-27.
  Vec p = Vec::broadcast(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = multiply_add(p, r, Vec::broadcast(coefficient));
  }
  return times_power_of_two(p, n);
}

inline Vec sigmoid(Vec x) {
  const Vec one = Vec::broadcast(1.0f);
  return one / (one + exp(Vec::broadcast(0.0f) - x));
}
