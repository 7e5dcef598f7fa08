// Panels of int8 products over the vector types `Vec`, `VecInt` and `VecShort` of the including
// file. Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

using dsv4::cpu::kInt8Panel;

// Sums that stay in registers: of 16 half, beside the weights and one row that they are made of;
// of AVX-512's 32 three quarters.
constexpr int kColumnsAtOnce = Vec::lanes == 16 ? 4 : 2;
constexpr int kRowsAtOnce = Vec::lanes == 16 ? 6 : 4;
// Channels widened at a time: 16 KiB of a panel, half of a first-level cache; the rows that it
// meets take 4 KiB more.
constexpr int64_t kChunk = 512;

// Adds to sums [rows, kInt8Panel] the products of whole vectors of channels.
// x: int16, rows x_stride apart; weight: a row per column, weight_stride apart.
template <int columns, int rows, class W>
void add_tile(const int16_t* x, int64_t x_stride, const W* weight, int64_t weight_stride,
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
    if constexpr (sizeof(W) == 1) {  // the next columns: the machine foresees no page's first line
      DSV4_UNROLL
      for (int c = 0; c < columns; ++c) {
        __builtin_prefetch(weight + (columns + c) * weight_stride + k);
      }
    }
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const VecShort value = VecShort::load(x + r * x_stride + k);
      DSV4_UNROLL
      for (int c = 0; c < columns; ++c) {
        total[r][c] = total[r][c] + multiply_pairs(value, w[c]);
      }
    }
  }
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int c = 0; c < columns; ++c) {
      int32_t* sum = sums + r * kInt8Panel + c;
      *sum = __builtin_bit_cast(
          int32_t, static_cast<uint32_t>(*sum) + static_cast<uint32_t>(total[r][c].sum()));
    }
  }
}

// The same of any number of columns, up to a panel.
template <int rows, class W>
void add_columns(const int16_t* x, int64_t x_stride, const W* weight, int64_t weight_stride,
                 int64_t columns, int64_t channels, int32_t* sums) {
  int64_t c = 0;
  for (; c + kColumnsAtOnce <= columns; c += kColumnsAtOnce) {
    add_tile<kColumnsAtOnce, rows>(x, x_stride, weight + c * weight_stride, weight_stride, channels,
                                   sums + c);
  }
  for (; c < columns; ++c) {
    add_tile<1, rows>(x, x_stride, weight + c * weight_stride, weight_stride, channels, sums + c);
  }
}

// And of any number of rows.
template <int rows_at_once, class W>
void add_rows(const int16_t* x, int64_t x_stride, const W* weight, int64_t weight_stride,
              int64_t columns, int64_t channels, int32_t* sums, int64_t rows) {
  for (; rows >= rows_at_once; rows -= rows_at_once) {
    add_columns<rows_at_once>(x, x_stride, weight, weight_stride, columns, channels, sums);
    x += rows_at_once * x_stride;
    sums += rows_at_once * kInt8Panel;
  }
  if constexpr (rows_at_once > 1) {
    if (rows > 0) {
      add_rows<rows_at_once - 1>(x, x_stride, weight, weight_stride, columns, channels, sums, rows);
    }
  }
}

// A row as int16, zeros from k to `width`.
void widen_int8_row(const int8_t* from, int64_t k, int64_t width, int16_t* to) {
  int64_t i = 0;
  for (; i + VecShort::lanes <= k; i += VecShort::lanes) VecShort::load(from + i).store(to + i);
  for (; i < k; ++i) to[i] = from[i];
  __builtin_memset(to + k, 0, static_cast<size_t>(width - k) * sizeof(int16_t));
}

inline int64_t whole_vectors(int64_t channels) {
  return channels / VecShort::lanes * VecShort::lanes;
}

// Few rows, which all meet what is widened in registers: every byte of the weight is loaded once.
inline void add_stored(const int16_t* x, int64_t x_stride, const int8_t* weight,
                       int64_t weight_stride, int64_t columns, int64_t k, int32_t* sums,
                       int64_t rows) {
  const int64_t whole = whole_vectors(k);
  add_rows<kRowsAtOnce>(x, x_stride, weight, weight_stride, columns, whole, sums, rows);
  if (whole < k) {
    int8_t end[kInt8Panel][VecShort::lanes] = {};
    for (int64_t c = 0; c < columns; ++c) {
      __builtin_memcpy(end[c], weight + c * weight_stride + whole, static_cast<size_t>(k - whole));
    }
    add_rows<kRowsAtOnce>(x + whole, x_stride, end[0], VecShort::lanes, columns, VecShort::lanes,
                          sums, rows);
  }
}

// Many rows: each chunk of the panel is widened once and meets them all while it is near.
inline void add_widened(const int16_t* x, int64_t x_stride, const int8_t* weight,
                        int64_t weight_stride, int64_t columns, int64_t k, int32_t* sums,
                        int64_t rows) {
  alignas(64) int16_t panel[kInt8Panel * kChunk];
  for (int64_t from = 0; from < k; from += kChunk) {
    const int64_t channels = k - from < kChunk ? k - from : kChunk;
    const int64_t padded = whole_vectors(channels + VecShort::lanes - 1);
    for (int64_t c = 0; c < columns; ++c) {
      const int8_t* codes = weight + c * weight_stride + from;
      widen_int8_row(codes, channels, padded, panel + c * kChunk);
      // The next chunk: the rows are too many streams for the machine to foresee.
      for (int64_t ahead = 0; ahead < channels; ahead += 64) {
        __builtin_prefetch(codes + channels + ahead);
      }
    }
    add_rows<kRowsAtOnce>(x + from, x_stride, panel, kChunk, columns, padded, sums, rows);
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

// sums [rows, kInt8Panel] as rows of y from `begin` on, `columns` from `first` on.
inline void store_sums(const dsv4::cpu::Int8Product& call, const int32_t* sums, int64_t expert,
                       int64_t begin, int64_t rows, int64_t first, int64_t columns) {
  int64_t at = begin * call.n + first;
  if (call.sums != nullptr) {
    for (int64_t r = 0; r < rows; ++r, at += call.n) {
      __builtin_memcpy(call.sums + at, sums + r * kInt8Panel,
                       static_cast<size_t>(columns) * sizeof(int32_t));
    }
    return;
  }
  float scale[kInt8Panel] = {};
  channel_scales(call.weight, expert, first, columns, scale);
  for (int64_t r = 0; r < rows; ++r, at += call.n) {
    const Vec of_row = Vec::broadcast(call.x.scale[(begin + r) * call.x.scale_stride]);
    for (int64_t c = 0; c < columns; c += Vec::lanes) {
      const Vec sum = Vec::load(sums + r * kInt8Panel + c);
      store_first(sum * Vec::load(scale + c) * of_row, call.scaled + at + c, columns - c);
    }
  }
}

// Rows begin .. end-1 of y, a panel of columns from `first` on, with the weight of `expert`.
// x: int16 [rows of the call, x_stride], zeros behind k. sums: scratch [end - begin, kInt8Panel].
void int8_panel(const dsv4::cpu::Int8Product& call, const int16_t* x, int64_t x_stride,
                int64_t expert, int64_t begin, int64_t end, int64_t first, int32_t* sums) {
  const dsv4::cpu::Int8Weight& weight = call.weight;
  const int64_t rows = end - begin;
  const int64_t columns = call.n - first < kInt8Panel ? call.n - first : kInt8Panel;
  const int8_t* codes = weight.codes + expert * weight.expert_stride + first * weight.row_stride;
  __builtin_memset(sums, 0, static_cast<size_t>(rows * kInt8Panel) * sizeof(int32_t));
  const auto add = rows <= kRowsAtOnce ? add_stored : add_widened;
  add(x + begin * x_stride, x_stride, codes, weight.row_stride, columns, call.k, sums, rows);
  store_sums(call, sums, expert, begin, rows, first, columns);
}
