// Transposition of small blocks in vectors of one or two lanes of 16 bytes, for every instruction
// set alike: the compiler's vector extensions. Included by rows headers inside a namespace, so it
// includes nothing and has no guard.

template <class T, int lanes>
struct LanesOf;

template <class T>
struct LanesOf<T, 1> {
  typedef T Type __attribute__((vector_size(16)));
};

template <class T>
struct LanesOf<T, 2> {
  typedef T Type __attribute__((vector_size(32)));
};

template <class T, int lanes = 1>
using Lanes = typename LanesOf<T, lanes>::Type;

template <class T>
constexpr int kPerLane = 16 / static_cast<int>(sizeof(T));

// The elements of a and b in turn, of the first and of the second half of each lane.
template <class T, int lanes = 1>
[[gnu::always_inline]] inline void interleave(const Lanes<T, lanes>& a, const Lanes<T, lanes>& b,
                                              Lanes<T, lanes>* low, Lanes<T, lanes>* high) {
  if constexpr (sizeof(T) == 1 && lanes == 1) {
    *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *high =
        __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (sizeof(T) == 1) {
    *low = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16,
                                   48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55);
    *high =
        __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  } else if constexpr (sizeof(T) == 2 && lanes == 1) {
    *low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (sizeof(T) == 2) {
    *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
    *high =
        __builtin_shufflevector(a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
  } else {
    static_assert(sizeof(T) == 4 && lanes == 1);
    *low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    *high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
}

// A block of rows, a vector of each: in every lane the first row's elements follow each other, then
// the second's. Becomes the elements of the first column, then of the second: a perfect shuffle of
// the halves, log2 of the rows times.
template <class T, int rows, int lanes = 1>
[[gnu::always_inline]] inline void transpose(Lanes<T, lanes> (&block)[rows]) {
  Lanes<T, lanes> shuffled[rows];
  DSV4_UNROLL
  for (int step = 1; step < rows; step *= 2) {
    DSV4_UNROLL
    for (int i = 0; i < rows / 2; ++i) {
      interleave<T, lanes>(block[i], block[i + rows / 2], &shuffled[2 * i], &shuffled[2 * i + 1]);
    }
    DSV4_UNROLL
    for (int i = 0; i < rows; ++i) block[i] = shuffled[i];
  }
}

// Templates, because a machine without vectors of two lanes has no good way to pass them.
template <class T, int lanes>
[[gnu::always_inline]] inline Lanes<T, lanes> join(const Lanes<uint8_t>& low,
                                                   const Lanes<uint8_t>& high) {
  static_assert(lanes == 2);
  using Both = Lanes<T, lanes>;
  return __builtin_bit_cast(
      Both,
      __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
                              17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
}

template <int lanes>
[[gnu::always_inline]] inline Lanes<uint16_t> low_lane(const Lanes<uint16_t, lanes>& both) {
  return __builtin_shufflevector(both, both, 0, 1, 2, 3, 4, 5, 6, 7);
}

template <int lanes>
[[gnu::always_inline]] inline Lanes<uint16_t> high_lane(const Lanes<uint16_t, lanes>& both) {
  return __builtin_shufflevector(both, both, 8, 9, 10, 11, 12, 13, 14, 15);
}
