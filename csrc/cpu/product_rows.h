// Panels of matrix products over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/code_rows.h"
#include "cpu/transpose.h"
// After the transposition that it uses.
#include "cpu/widen_rows.h"
// After the panels that it counts.
#include "cpu/tiles.h"

constexpr int kPanelFloats = kChunk * kPanelRows;

inline int64_t bytes_of(dsv4::cpu::Stored format, int64_t channels) {
  switch (format) {
    case dsv4::cpu::Stored::f32:
      return channels * 4;
    case dsv4::cpu::Stored::bf16:
    case dsv4::cpu::Stored::f16:
      return channels * 2;
    case dsv4::cpu::Stored::e4m3:
      return channels;
    default:
      return channels / 2;
  }
}

// What quantised codes of 16 rows are multiplied by in each block of a chunk, of which they come as
// 2^-8 of their values: twice if a scale is so large that 2^8 of it is no fp32.
struct Factors {
  static constexpr int kCount = kChunk / kBlock * kPanelRows;
  alignas(64) float first[kCount];
  alignas(64) float second[kCount];  // 1 where the first is enough
  bool twice;
};

// 2^(exponent - 127), a normal number.
inline float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(exponent) << 23);
}

// Of 16 rows from `first` on for `blocks` blocks from channel `k` on.
inline void load_factors(const dsv4::cpu::StoredWeight& weight, int64_t expert, int64_t first,
                         int64_t last, int64_t k, int64_t blocks, Factors& factors) {
  uint8_t scale[Factors::kCount] = {};
  const uint8_t* from = weight.scale + expert * weight.scale_expert_stride;
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* to = scale + block * kPanelRows;
    const int64_t channel = k + block * kBlock;
    if (weight.format == dsv4::cpu::Stored::e4m3) {  // 16 rows lie in one tile of 128
      const uint8_t* tiles = from + first / 128 * weight.scale_row_stride;
      __builtin_memset(to, tiles[channel / 128 * weight.scale_block_stride], kPanelRows);
      continue;
    }
    const uint8_t* column = from + channel / kBlock * weight.scale_block_stride;
    for (int i = 0; i < kPanelRows; ++i) {
      to[i] = column[(first + i < last ? first + i : last) * weight.scale_row_stride];
    }
  }
  constexpr uint8_t most = 246;
  uint8_t largest = 0;
  for (int i = 0; i < Factors::kCount; ++i) {
    factors.first[i] = power_of_two((scale[i] < most ? scale[i] : most) + 8);
    largest = scale[i] > largest ? scale[i] : largest;
  }
  factors.twice = largest > most;
  for (int i = 0; factors.twice && i < Factors::kCount; ++i) {
    const int rest = scale[i] > most ? scale[i] - most : 0;
    factors.second[i] = scale[i] == 255 ? __builtin_nanf("") : power_of_two(rest + 127);
  }
}

// Calls each(emit) with an emit that scales.
template <class Each, class Emit>
[[gnu::always_inline]] inline void scaled(const Factors& by, int64_t block, const Each& each,
                                          const Emit& emit) {
  const int64_t at = block * kPanelRows;
  Vec first[kPanelVectors];
  DSV4_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) first[v] = Vec::load(by.first + at + v * Vec::lanes);
  if (by.twice) [[unlikely]] {
    each([&](int channel, int v, Vec value) __attribute__((always_inline)) {
      emit(channel, v, value * first[v] * Vec::load(by.second + at + v * Vec::lanes));
    });
  } else {
    each([&](int channel, int v, Vec value)
             __attribute__((always_inline)) { emit(channel, v, value * first[v]); });
  }
}

// Calls emit(channel, vector of the panel, values) for block `block` of a chunk of 16 rows;
// channels of a row rise.
template <class Emit>
[[gnu::always_inline]] inline void each_weight(dsv4::cpu::Stored format, const PanelRows& rows,
                                               int64_t block, const Factors& by, const Emit& emit) {
  const int64_t at = bytes_of(format, block * kBlock);
  switch (format) {
    case dsv4::cpu::Stored::f32:
      return each_float(rows, at, emit);
    case dsv4::cpu::Stored::bf16:
      return each_short<false>(rows, at, emit);
    case dsv4::cpu::Stored::f16:
      return each_short<true>(rows, at, emit);
    case dsv4::cpu::Stored::e4m3:
      return scaled(
          by, block,
          [&](const auto& to) __attribute__((always_inline)) { each_e4m3(rows, at, to); }, emit);
    case dsv4::cpu::Stored::e2m1:
      return scaled(
          by, block,
          [&](const auto& to) __attribute__((always_inline)) { each_e2m1(rows, at, to); }, emit);
  }
}

// panel: [32, 16].
inline void widen(dsv4::cpu::Stored format, const PanelRows& rows, int64_t block, const Factors& by,
                  float* panel) {
  const auto store = [&](int channel, int v, Vec value) __attribute__((always_inline)) {
    value.store(panel + channel * kPanelRows + v * Vec::lanes);
  };
  each_weight(format, rows, block, by, store);
}

// Adds to sums [16] the products of 32 channels of one row, in the order of `add_panel`.
inline void add_block(dsv4::cpu::Stored format, const PanelRows& rows, int64_t block,
                      const Factors& by, const float* x, float* sums) {
  Vec chains[2][kPanelVectors];
  DSV4_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) chains[0][v] = chains[1][v] = Vec::broadcast(0.0f);
  const auto add = [&](int channel, int v, Vec value) __attribute__((always_inline)) {
    Vec& chain = chains[channel % 2][v];
    chain = fused_multiply_add(Vec::broadcast(x[channel]), value, chain);
  };
  each_weight(format, rows, block, by, add);
  DSV4_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) {
    float* sum = sums + v * Vec::lanes;
    (Vec::load(sum) + (chains[0][v] + chains[1][v])).store(sum);
  }
}

// The sums of some rows with the columns of some panels.
template <int rows, int panels>
struct Tile {
  static constexpr int vectors = panels * kPanelVectors;
  Vec sum[rows][vectors];
};

// 16 fused multiply-adds from zero over every second channel of a block.
template <int rows, int panels>
[[gnu::always_inline]] inline void chain_of(const float* x, int64_t x_stride, const float* panel,
                                            Tile<rows, panels>& tile) {
  constexpr int vectors = Tile<rows, panels>::vectors;
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) tile.sum[r][v] = Vec::broadcast(0.0f);
  }
  for (int k = 0; k < kBlock; k += 2) {
    Vec w[vectors];
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const float* of = panel + v / kPanelVectors * kPanelFloats;
      w[v] = Vec::load(of + k * kPanelRows + v % kPanelVectors * Vec::lanes);
    }
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec value = Vec::broadcast(x[r * x_stride + k]);
      DSV4_UNROLL
      for (int v = 0; v < vectors; ++v) {
        tile.sum[r][v] = fused_multiply_add(value, w[v], tile.sum[r][v]);
      }
    }
  }
}

// Adds to sums [rows, kStripeColumns] the products of `blocks` blocks of 32 channels.
// x: fp32, rows x_stride apart; panel: [panels, kChunk, 16].
template <int rows, int panels>
void add_tile(const float* x, int64_t x_stride, const float* panel, int64_t blocks, float* sums) {
  for (int64_t block = 0; block < blocks; ++block) {
    Tile<rows, panels> even, odd;
    chain_of(x, x_stride, panel, even);
    chain_of(x + 1, x_stride, panel + kPanelRows, odd);
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      DSV4_UNROLL
      for (int v = 0; v < even.vectors; ++v) {
        float* sum = sums + r * kStripeColumns + v * Vec::lanes;
        (Vec::load(sum) + (even.sum[r][v] + odd.sum[r][v])).store(sum);
      }
    }
    x += kBlock;
    panel += kBlock * kPanelRows;
  }
}

template <class Y>
void store_sums(const dsv4::cpu::Product& call, const float* sums, int64_t begin, int64_t rows,
                int64_t first, int64_t columns) {
  const int64_t width = call.n - first < columns ? call.n - first : columns;
  Y* y = static_cast<Y*>(call.y) + begin * call.y_row_stride + first;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += Vec::lanes) {
      store_first(Vec::load(sums + r * kStripeColumns + i), y + r * call.y_row_stride + i,
                  width - i);
    }
  }
}

// sums [rows, kStripeColumns] as rows of y from `begin` on, `columns` columns from `first` on.
inline void store_stripe(const dsv4::cpu::Product& call, const float* sums, int64_t begin,
                         int64_t rows, int64_t first, int64_t columns) {
  DSV4_FOR_DTYPE(call.dtype, store_sums, call, sums, begin, rows, first, columns);
}

// 16 rows of W, of which a chunk is staged at a time.
struct StoredPanel {
  const dsv4::cpu::StoredWeight& weight;
  int64_t expert;
  int64_t first;
  int64_t last;  // rows behind it are it again
  PanelRows rows;

  StoredPanel(const dsv4::cpu::Product& call, int64_t of_expert, int64_t first_row)
      : weight(call.weight), expert(of_expert), first(first_row), last(call.n - 1) {
    const auto* codes = static_cast<const uint8_t*>(weight.codes);
    for (int i = 0; i < kPanelRows; ++i) {
      const int64_t row = first + i < last ? first + i : last;
      const int64_t elements = expert * weight.expert_stride + row * weight.row_stride;
      rows.row[i] = codes + elements * weight.element_bytes;
    }
  }

  // Calls each(block of the chunk, staged rows, factors) for `channels` channels from `k` on, and
  // asks for the chunk of as many that is next: of these rows, or behind the end those of the panel
  // that starts a stripe further.
  template <class Each>
  [[gnu::always_inline]] void each_block(int64_t k, int64_t channels, int64_t end, Staged& staged,
                                         const Each& each) const {
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    const int64_t width = bytes_of(weight.format, channels);
    staged.copy(rows, bytes_of(weight.format, k), width, bytes_of(weight.format, blocks * kBlock));
    Factors factors;
    if (weight.scale != nullptr) load_factors(weight, expert, first, last, k, blocks, factors);
    const int64_t next = k + channels < end
                             ? bytes_of(weight.format, k + channels)
                             : kStripeColumns * weight.row_stride * weight.element_bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      Staged::prefetch(rows, next, width, block, blocks);
      each(block, staged.rows(), factors);
    }
  }
};

// sums [16] = x . the rows of a panel, for one row of x.
inline void add_row(const dsv4::cpu::Product& call, const StoredPanel& panel, const float* x,
                    float* sums) {
  Staged staged;
  const dsv4::FlushSubnormals flush;
  for (int64_t k = 0; k < call.k; k += kChunk) {
    const int64_t channels = call.k - k < kChunk ? call.k - k : kChunk;
    panel.each_block(k, channels, call.k, staged,
                     [&](int64_t block, const PanelRows& rows, const Factors& factors) {
                       add_block(call.weight.format, rows, block, factors, x + k + block * kBlock,
                                 sums);
                     });
  }
}

// The same for many rows of x and for `panels` panels from row `first` of W on.
template <int panels>
void add_panels(const dsv4::cpu::Product& call, int64_t expert, int64_t first, const float* x,
                int64_t x_stride, int64_t rows, float* sums) {
  alignas(64) float wide[panels * kPanelFloats];
  Staged staged;
  for (int64_t k = 0; k < call.k; k += kChunk) {
    const int64_t channels = call.k - k < kChunk ? call.k - k : kChunk;
    for (int p = 0; p < panels; ++p) {
      const StoredPanel panel(call, expert, first + p * kPanelRows);
      panel.each_block(k, channels, call.k, staged,
                       [&](int64_t block, const PanelRows& of, const Factors& factors) {
                         widen(call.weight.format, of, block, factors,
                               wide + p * kPanelFloats + block * kBlock * kPanelRows);
                       });
    }
    const dsv4::FlushSubnormals flush;
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    each_tile<kRowsAtOnce<panels>>(rows, [&]<int of>(Number<of>, int64_t first_row) {
      add_tile<of, panels>(x + first_row * x_stride + k, x_stride, wide, blocks,
                           sums + first_row * kStripeColumns);
    });
  }
}

// Rows begin .. end-1 of y, `panels` panels of columns from `first` on, up to kStripePanels, with
// the weight of `expert`.
// x: fp32 [rows of the call, x_stride], zeros behind k. sums: scratch [end - begin,
// kStripeColumns].
void product_stripe(const dsv4::cpu::Product& call, const float* x, int64_t x_stride,
                    int64_t expert, int64_t begin, int64_t end, int64_t first, int64_t panels,
                    float* sums) {
  const int64_t rows = end - begin;
  const float* from = x + begin * x_stride;
  __builtin_memset(sums, 0, static_cast<size_t>(rows * kStripeColumns) * sizeof(float));
  if (rows > 1 && panels == kStripePanels) {
    add_panels<kStripePanels>(call, expert, first, from, x_stride, rows, sums);
  } else {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = first + p * kPanelRows;
      float* to = sums + p * kPanelRows;
      if (rows == 1) {
        add_row(call, StoredPanel(call, expert, row), from, to);
      } else {
        add_panels<1>(call, expert, row, from, x_stride, rows, to);
      }
    }
  }
  store_stripe(call, sums, begin, rows, first, panels * kPanelRows);
}

// e4m3 codes times the scale of every 128 of them.
inline void widen_scaled(const uint8_t* codes, const uint8_t* scale, int64_t scale_stride,
                         int64_t k, float* to, int64_t width) {
  widen_row(reinterpret_cast<const E4m3Code*>(codes), k, to, width);
  for (int64_t first = 0; first < k; first += 128) {
    const Vec factor = Vec::broadcast(dsv4::e8m0_value(scale[first / 128 * scale_stride]));
    for (int64_t i = first; i < k && i < first + 128; i += Vec::lanes) {
      (Vec::load(to + i) * factor).store(to + i);
    }
  }
}

// Row `row` of x as fp32, zeros from k to `width`.
void widen_activations(const dsv4::cpu::Activations& x, int64_t row, int64_t k, int64_t width,
                       float* to) {
  const auto* values = static_cast<const uint8_t*>(x.values);
  const int64_t at = row * x.row_stride;
  switch (x.format) {
    case dsv4::cpu::Stored::f32:
      return widen_row(reinterpret_cast<const float*>(values) + at, k, to, width);
    case dsv4::cpu::Stored::bf16:
      return widen_row(reinterpret_cast<const dsv4::BFloat16*>(values) + at, k, to, width);
    case dsv4::cpu::Stored::f16:
      return widen_row(reinterpret_cast<const dsv4::Half*>(values) + at, k, to, width);
    default:
      return widen_scaled(values + at, x.scale + row * x.scale_row_stride, x.scale_block_stride, k,
                          to, width);
  }
}
