// Tiles of some rows and the columns of some panels, whose sums stay in registers.
// Included by rows headers inside a namespace after widen_rows.h, so it includes nothing and has no
// guard.

// Panels that meet a row at a time. A vector of AVX-512 is a whole panel, but the machine loads
// hardly more than one such vector a cycle where it multiplies two: a value of the row serves four.
constexpr int kStripePanels = Vec::lanes == 16 ? 4 : 1;
constexpr int64_t kStripeColumns = kStripePanels * kPanelRows;

// Rows of a tile: of 16 registers, 12 hold sums, and of AVX-512's 32 24, or 12 of one panel alone.
template <int panels>
constexpr int kRowsAtOnce = Vec::lanes == 8 ? 6 : (panels == 1 ? 12 : 24 / panels);

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
