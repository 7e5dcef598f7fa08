// Tiles of any number of rows, whose sums stay in registers.
// Included by rows headers inside a namespace, so it includes nothing and has no guard.

template <int value>
struct Number {};

// Calls run(Number<count>) for a count up to `most` that is known at run time.
template <int most, class Run>
inline void with_number(int64_t count, const Run& run) {
  if (count == most) return run(Number<most>{});
  if constexpr (most > 1) with_number<most - 1>(count, run);
}

// Calls run(Number<rows of the tile>, its first row) for tiles of up to `most` rows, as equal as
// can be.
template <int most, class Run>
inline void each_tile(int64_t rows, const Run& run) {
  int64_t first = 0;
  for (int64_t tiles = (rows + most - 1) / most; tiles > 0; --tiles) {
    const int64_t some = (rows - first + tiles - 1) / tiles;
    with_number<most>(some, [&](auto number) { run(number, first); });
    first += some;
  }
}
