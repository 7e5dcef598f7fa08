// Panels of matrix products over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// headers of its own.

#include "cpu/code_rows.h"
#include "cpu/transpose.h"
// After the transposition that it uses.
#include "cpu/widen_rows.h"

// Rows of activations whose sums stay in registers: of 16, 12 hold sums; of AVX-512's 32 as well.
constexpr int kRowsAtOnce = Vec::lanes == 16 ? 12 : 6;

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
  static constexpr int count = kChunk / kBlock * kPanelRows;
  alignas(64) float first[count];
  alignas(64) float second[count];  // 1 where the first is enough
  bool twice;
};

// 2^(exponent - 127), a normal number.
inline float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(exponent) << 23);
}

// Of 16 rows from `first` on for `blocks` blocks from channel `k` on.
inline void load_factors(const dsv4::cpu::StoredWeight& weight, int64_t expert, int64_t first,
                         int64_t last, int64_t k, int64_t blocks, Factors& factors) {
  uint8_t scale[Factors::count] = {};
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
  for (int i = 0; i < Factors::count; ++i) {
    factors.first[i] = power_of_two((scale[i] < most ? scale[i] : most) + 8);
    largest = scale[i] > largest ? scale[i] : largest;
  }
  factors.twice = largest > most;
  for (int i = 0; factors.twice && i < Factors::count; ++i) {
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

// 16 fused multiply-adds from zero over every second channel of a block.
template <int count>
[[gnu::always_inline]] inline void chain_of(const float* x, int64_t x_stride, const float* panel,
                                            Vec (&sum)[count][kPanelVectors]) {
  DSV4_UNROLL
  for (int r = 0; r < count; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = Vec::broadcast(0.0f);
  }
  for (int k = 0; k < kBlock; k += 2) {
    Vec w[kPanelVectors];
    DSV4_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      w[v] = Vec::load(panel + k * kPanelRows + v * Vec::lanes);
    }
    DSV4_UNROLL
    for (int r = 0; r < count; ++r) {
      const Vec value = Vec::broadcast(x[r * x_stride + k]);
      DSV4_UNROLL
      for (int v = 0; v < kPanelVectors; ++v) {
        sum[r][v] = fused_multiply_add(value, w[v], sum[r][v]);
      }
    }
  }
}

// Adds to sums [count, 16] the products of `blocks` blocks of 32 channels.
// x: fp32, rows x_stride apart; panel: [32 * blocks, 16].
template <int count>
void add_panel(const float* x, int64_t x_stride, const float* panel, int64_t blocks, float* sums) {
  for (int64_t block = 0; block < blocks; ++block) {
    Vec even[count][kPanelVectors], odd[count][kPanelVectors];
    chain_of(x, x_stride, panel, even);
    chain_of(x + 1, x_stride, panel + kPanelRows, odd);
    DSV4_UNROLL
    for (int r = 0; r < count; ++r) {
      DSV4_UNROLL
      for (int v = 0; v < kPanelVectors; ++v) {
        float* sum = sums + r * kPanelRows + v * Vec::lanes;
        (Vec::load(sum) + (even[r][v] + odd[r][v])).store(sum);
      }
    }
    x += kBlock;
    panel += kBlock * kPanelRows;
  }
}

template <int count>
void add_rows(const float* x, int64_t x_stride, const float* panel, int64_t blocks, float* sums,
              int64_t rows) {
  for (; rows >= count; rows -= count) {
    add_panel<count>(x, x_stride, panel, blocks, sums);
    x += count * x_stride;
    sums += count * kPanelRows;
  }
  if constexpr (count > 1) {
    if (rows > 0) {
      add_rows<(count > 6 ? 6 : count - 1)>(x, x_stride, panel, blocks, sums, rows);
    }
  }
}

template <class Y>
void store_sums(const dsv4::cpu::Product& call, const float* sums, int64_t begin, int64_t rows,
                int64_t first) {
  const int64_t width = call.n - first < kPanelRows ? call.n - first : kPanelRows;
  Y* y = static_cast<Y*>(call.y) + begin * call.y_row_stride + first;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += Vec::lanes) {
      store_first(Vec::load(sums + r * kPanelRows + i), y + r * call.y_row_stride + i, width - i);
    }
  }
}

// sums [rows, 16] as rows of y from `begin` on, 16 columns from `first` on.
inline void store_panel(const dsv4::cpu::Product& call, const float* sums, int64_t begin,
                        int64_t rows, int64_t first) {
  DSV4_FOR_DTYPE(call.dtype, store_sums, call, sums, begin, rows, first);
}

// Rows begin .. end-1 of y, 16 columns from `first` on, with the weight of `expert`.
// x: fp32 [rows of the call, x_stride], zeros behind k. sums: scratch [end - begin, 16].
void product_panel(const dsv4::cpu::Product& call, const float* x, int64_t x_stride, int64_t expert,
                   int64_t begin, int64_t end, int64_t first, float* sums) {
  const dsv4::cpu::StoredWeight& weight = call.weight;
  const int64_t last = call.n - 1;
  const auto* codes = static_cast<const uint8_t*>(weight.codes);
  PanelRows rows;
  for (int i = 0; i < kPanelRows; ++i) {
    const int64_t row = first + i < last ? first + i : last;
    const int64_t elements = expert * weight.expert_stride + row * weight.row_stride;
    rows.row[i] = codes + elements * weight.element_bytes;
  }
  __builtin_memset(sums, 0, static_cast<size_t>((end - begin) * kPanelRows) * sizeof(float));
  alignas(64) float panel[kChunk * kPanelRows];
  Staged staged;
  Factors factors;
  const int64_t next_panel = kPanelRows * weight.row_stride * weight.element_bytes;
  for (int64_t k = 0; k < call.k; k += kChunk) {
    const int64_t channels = call.k - k < kChunk ? call.k - k : kChunk;
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    staged.copy(rows, bytes_of(weight.format, k), bytes_of(weight.format, channels),
                bytes_of(weight.format, blocks * kBlock));
    const float* from = x + begin * x_stride + k;
    const int64_t width = bytes_of(weight.format, kChunk);
    const int64_t next = k + kChunk < call.k ? bytes_of(weight.format, k + kChunk) : next_panel;
    if (weight.scale != nullptr) load_factors(weight, expert, first, last, k, blocks, factors);
    if (end - begin == 1) {
      const dsv4::FlushSubnormals flush;
      for (int64_t block = 0; block < blocks; ++block) {
        Staged::prefetch(rows, next, width, block);
        add_block(weight.format, staged.rows(), block, factors, from + block * kBlock, sums);
      }
      continue;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      Staged::prefetch(rows, next, width, block);
      widen(weight.format, staged.rows(), block, factors, panel + block * kBlock * kPanelRows);
    }
    const dsv4::FlushSubnormals flush;
    add_rows<kRowsAtOnce>(from, x_stride, panel, blocks, sums, end - begin);
  }
  store_panel(call, sums, begin, end - begin, first);
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
