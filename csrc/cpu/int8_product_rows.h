// Panels of int8 products over the vector types `Vec`, `VecInt` and `VecShort` of the including
// file. Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but
// the headers of its own.

#include "cpu/transpose.h"
// After the transposition that it uses.
#include "cpu/widen_rows.h"
// After the panels that it counts.
#include "cpu/tiles.h"

constexpr int kPanelShorts = kChunk * kPanelRows;
// Few rows take the weight as it is stored: of as many columns at a time.
constexpr int kFewRows = Vec::lanes == 16 ? 6 : 4;
constexpr int kColumnsAtOnce = Vec::lanes == 16 ? 4 : 2;

// Adds to sums [rows, kStripeColumns] the products of whole vectors of channels, which are added up
// across lanes at the end.
// x: int16, rows x_stride apart; weight: a row per column, weight_stride apart.
template <int columns, int rows>
void add_dots(const int16_t* x, int64_t x_stride, const int8_t* weight, int64_t weight_stride,
              int64_t channels, int32_t* sums) {
  VecInt total[rows][columns];
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int c = 0; c < columns; ++c) total[r][c] = VecInt::broadcast(0);
  }
  for (int64_t k = 0; k < channels; k += VecShort::lanes) {
    VecShort w[columns];
    DSV4_UNROLL
    for (int c = 0; c < columns; ++c) w[c] = VecShort::load(weight + c * weight_stride + k);
    DSV4_UNROLL
    for (int c = 0; c < columns; ++c) {  // the machine foresees no page's first line
      __builtin_prefetch(weight + (columns + c) * weight_stride + k);
    }
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const VecShort value = VecShort::load(x + r * x_stride + k);
      DSV4_UNROLL
      for (int c = 0; c < columns; ++c) total[r][c] = add_pairs(total[r][c], value, w[c]);
    }
  }
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int c = 0; c < columns; ++c) {
      int32_t* sum = sums + r * kStripeColumns + c;
      *sum = __builtin_bit_cast(
          int32_t, static_cast<uint32_t>(*sum) + static_cast<uint32_t>(total[r][c].sum()));
    }
  }
}

// The same of any number of columns, up to a stripe, and of up to kFewRows rows.
inline void add_few(const int16_t* x, int64_t x_stride, const int8_t* weight, int64_t weight_stride,
                    int64_t columns, int64_t channels, int32_t* sums, int64_t rows) {
  with_number<kFewRows>(rows, [&]<int of>(Number<of>) {
    int64_t c = 0;
    for (; c + kColumnsAtOnce <= columns; c += kColumnsAtOnce) {
      add_dots<kColumnsAtOnce, of>(x, x_stride, weight + c * weight_stride, weight_stride, channels,
                                   sums + c);
    }
    for (; c < columns; ++c) {
      add_dots<1, of>(x, x_stride, weight + c * weight_stride, weight_stride, channels, sums + c);
    }
  });
}

// A row as int16, zeros from k to `width`.
void widen_int8_row(const int8_t* from, int64_t k, int64_t width, int16_t* to) {
  int64_t i = 0;
  for (; i + VecShort::lanes <= k; i += VecShort::lanes) VecShort::load(from + i).store(to + i);
  for (; i < k; ++i) to[i] = from[i];
  __builtin_memset(to + k, 0, static_cast<size_t>(width - k) * sizeof(int16_t));
}

// Every byte of the weight is loaded once, and widened in registers.
inline void add_stored(const int16_t* x, int64_t x_stride, const int8_t* weight,
                       int64_t weight_stride, int64_t columns, int64_t k, int32_t* sums,
                       int64_t rows) {
  const int64_t whole = k / VecShort::lanes * VecShort::lanes;
  add_few(x, x_stride, weight, weight_stride, columns, whole, sums, rows);
  if (whole < k) {
    int8_t end[kStripeColumns][VecShort::lanes] = {};
    for (int64_t c = 0; c < columns; ++c) {
      __builtin_memcpy(end[c], weight + c * weight_stride + whole, static_cast<size_t>(k - whole));
    }
    add_few(x + whole, x_stride, end[0], VecShort::lanes, columns, VecShort::lanes, sums, rows);
  }
}

// Adds to sums [rows, kStripeColumns] the products of `pairs` pairs of channels: lanes are columns.
// x: int16, rows x_stride apart; panel: [panels, kChunk / 2, 16, 2].
template <int rows, int panels>
void add_pairs_tile(const int16_t* x, int64_t x_stride, const int16_t* panel, int64_t pairs,
                    int32_t* sums) {
  constexpr int vectors = panels * kPanelVectors;
  VecInt total[rows][vectors];
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) {
      total[r][v] = VecInt::load(sums + r * kStripeColumns + v * Vec::lanes);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    VecShort w[vectors];
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const int16_t* of = panel + v / kPanelVectors * kPanelShorts;
      w[v] = VecShort::load(of + pair * 2 * kPanelRows + v % kPanelVectors * VecShort::lanes);
    }
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const VecShort value = VecShort::broadcast_pair(x + r * x_stride + 2 * pair);
      DSV4_UNROLL
      for (int v = 0; v < vectors; ++v) total[r][v] = add_pairs(total[r][v], value, w[v]);
    }
  }
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) {
      total[r][v].store(sums + r * kStripeColumns + v * Vec::lanes);
    }
  }
}

// `channels` channels of 16 rows, a multiple of 32, as int16: of each pair the values of all rows.
inline void widen_pairs(const PanelRows& rows, int64_t channels, int16_t* panel) {
  for (int group = 0; group < kGroups; ++group) {
    for (int64_t from = 0; from < channels; from += kBlock / 2) {
      Codes<uint16_t> block[kGroup];
      load_columns<uint16_t>(rows, group, from, block);
      DSV4_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        int8_t codes[sizeof(block[i])];
        __builtin_memcpy(codes, &block[i], sizeof(codes));
        int16_t* to = panel + (from + 2 * i) * kPanelRows + group * 2 * kGroup;
        for (int at = 0; at < static_cast<int>(sizeof(codes)); at += VecShort::lanes) {
          VecShort::load(codes + at).store(to + at);
        }
      }
    }
  }
}

// Many rows: each chunk of `panels` panels is widened once and meets them all while it is near.
template <int panels>
void add_widened(const int16_t* x, int64_t x_stride, const int8_t* weight, int64_t weight_stride,
                 int64_t columns, int64_t k, int32_t* sums, int64_t rows) {
  alignas(64) int16_t wide[panels * kPanelShorts];
  Staged staged;
  for (int64_t from = 0; from < k; from += kChunk) {
    const int64_t channels = k - from < kChunk ? k - from : kChunk;
    const int64_t padded = (channels + kBlock - 1) / kBlock * kBlock;
    for (int p = 0; p < panels; ++p) {
      PanelRows stored;
      for (int64_t i = 0; i < kPanelRows; ++i) {
        const int64_t column = p * kPanelRows + i;
        const int64_t row = column < columns ? column : columns - 1;
        stored.row[i] = reinterpret_cast<const uint8_t*>(weight + row * weight_stride);
      }
      staged.copy(stored, from, channels, padded);
      if (from + channels < k) Staged::prefetch(stored, from + channels, channels, 0, 1);
      widen_pairs(staged.rows(), padded, wide + p * kPanelShorts);
    }
    each_tile<kRowsAtOnce<panels>>(rows, [&]<int of>(Number<of>, int64_t first) {
      add_pairs_tile<of, panels>(x + first * x_stride + from, x_stride, wide, padded / 2,
                                 sums + first * kStripeColumns);
    });
  }
}

template <class Scale>
void load_scales(const dsv4::cpu::Int8Weight& weight, int64_t at, int64_t columns, float* scale) {
  const auto* from = static_cast<const Scale*>(weight.scale) + at;
  for (int64_t c = 0; c < columns; ++c) scale[c] = dsv4::to_float(from[c * weight.scale_stride]);
}

inline void channel_scales(const dsv4::cpu::Int8Weight& weight, int64_t expert, int64_t first,
                           int64_t columns, float* scale) {
  const int64_t at = expert * weight.scale_expert_stride + first * weight.scale_stride;
  DSV4_FOR_DTYPE(weight.scale_dtype, load_scales, weight, at, columns, scale);
}

// sums [rows, kStripeColumns] as rows of y from `begin` on, `columns` from `first` on.
inline void store_sums(const dsv4::cpu::Int8Product& call, const int32_t* sums, int64_t expert,
                       int64_t begin, int64_t rows, int64_t first, int64_t columns) {
  int64_t at = begin * call.n + first;
  if (call.sums != nullptr) {
    for (int64_t r = 0; r < rows; ++r, at += call.n) {
      __builtin_memcpy(call.sums + at, sums + r * kStripeColumns,
                       static_cast<size_t>(columns) * sizeof(int32_t));
    }
    return;
  }
  float scale[kStripeColumns] = {};
  channel_scales(call.weight, expert, first, columns, scale);
  for (int64_t r = 0; r < rows; ++r, at += call.n) {
    const Vec of_row = Vec::broadcast(call.x.scale[(begin + r) * call.x.scale_stride]);
    for (int64_t c = 0; c < columns; c += Vec::lanes) {
      const Vec sum = Vec::load(sums + r * kStripeColumns + c);
      store_first(sum * Vec::load(scale + c) * of_row, call.scaled + at + c, columns - c);
    }
  }
}

// Rows begin .. end-1 of y, `panels` panels of columns from `first` on, up to kStripePanels, with
// the weight of `expert`.
// x: int16 [rows of the call, x_stride], zeros behind k. sums: scratch [end - begin,
// kStripeColumns].
void int8_stripe(const dsv4::cpu::Int8Product& call, const int16_t* x, int64_t x_stride,
                 int64_t expert, int64_t begin, int64_t end, int64_t first, int64_t panels,
                 int32_t* sums) {
  const dsv4::cpu::Int8Weight& weight = call.weight;
  const int64_t rows = end - begin;
  const int64_t widest = panels * kPanelRows;
  const int64_t columns = call.n - first < widest ? call.n - first : widest;
  const int8_t* codes = weight.codes + expert * weight.expert_stride + first * weight.row_stride;
  __builtin_memset(sums, 0, static_cast<size_t>(rows * kStripeColumns) * sizeof(int32_t));
  const int16_t* from = x + begin * x_stride;
  if (rows <= kFewRows) {
    add_stored(from, x_stride, codes, weight.row_stride, columns, call.k, sums, rows);
  } else if (panels == kStripePanels) {
    add_widened<kStripePanels>(from, x_stride, codes, weight.row_stride, columns, call.k, sums,
                               rows);
  } else {
    for (int64_t c = 0; c < columns; c += kPanelRows) {
      add_widened<1>(from, x_stride, codes + c * weight.row_stride, weight.row_stride, columns - c,
                     call.k, sums + c, rows);
    }
  }
  store_sums(call, sums, expert, begin, rows, first, columns);
}
