// Transposition of small blocks in 16-byte vectors, for every instruction set alike: the compiler's
// vector extensions. Included by rows headers inside a namespace, so it includes nothing and has no
// guard.

template <class T>
struct Lanes16 {
  static constexpr int count = 16 / static_cast<int>(sizeof(T));
  typedef T Type __attribute__((vector_size(16)));
};

template <class T>
using Vector16 = typename Lanes16<T>::Type;

[[gnu::always_inline]] inline void interleave(const Vector16<uint8_t>& a,
                                              const Vector16<uint8_t>& b, Vector16<uint8_t>* low,
                                              Vector16<uint8_t>* high) {
  *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *high =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

[[gnu::always_inline]] inline void interleave(const Vector16<uint16_t>& a,
                                              const Vector16<uint16_t>& b, Vector16<uint16_t>* low,
                                              Vector16<uint16_t>* high) {
  *low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

[[gnu::always_inline]] inline void interleave(const Vector16<uint32_t>& a,
                                              const Vector16<uint32_t>& b, Vector16<uint32_t>* low,
                                              Vector16<uint32_t>* high) {
  *low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  *high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// A block of rows, a vector of each: the first row's elements follow each other, then the second's.
// Becomes the elements of the first column, then of the second: a perfect shuffle of the halves,
// log2 of the rows times.
template <class T, int rows>
[[gnu::always_inline]] inline void transpose(Vector16<T> (&block)[rows]) {
  Vector16<T> shuffled[rows];
  DSV4_UNROLL
  for (int step = 1; step < rows; step *= 2) {
    DSV4_UNROLL
    for (int i = 0; i < rows / 2; ++i) {
      interleave(block[i], block[i + rows / 2], &shuffled[2 * i], &shuffled[2 * i + 1]);
    }
    DSV4_UNROLL
    for (int i = 0; i < rows; ++i) block[i] = shuffled[i];
  }
}
