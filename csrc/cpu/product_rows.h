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

// Scales of 16 rows from `first` on for the 32 channels from `k` on.
inline void load_scales(const dsv4::cpu::StoredWeight& weight, int64_t expert, int64_t first,
                        int64_t last, int64_t k, float (&scale)[kPanelRows]) {
  const uint8_t* from = weight.scale + expert * weight.scale_expert_stride;
  if (weight.format == dsv4::cpu::Stored::e4m3) {  // 16 rows lie in one tile of 128
    from += first / 128 * weight.scale_row_stride + k / 128 * weight.scale_block_stride;
    for (float& value : scale) value = dsv4::e8m0_value(*from);
    return;
  }
  from += k / kBlock * weight.scale_block_stride;
  uint8_t bytes[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) {
    const int64_t row = first + i < last ? first + i : last;
    bytes[i] = from[row * weight.scale_row_stride];
  }
  for (int i = 0; i < kPanelRows; ++i) scale[i] = dsv4::e8m0_value(bytes[i]);
}

// 32 channels of 16 rows from byte `at` on.
inline void widen(dsv4::cpu::Stored format, const PanelRows& rows, int64_t at,
                  const float (&scale)[kPanelRows], float* panel) {
  switch (format) {
    case dsv4::cpu::Stored::f32:
      return widen_floats<float, uint32_t>(rows, at, panel);
    case dsv4::cpu::Stored::bf16:
      return widen_floats<dsv4::BFloat16, uint16_t>(rows, at, panel);
    case dsv4::cpu::Stored::f16:
      return widen_floats<dsv4::Half, uint16_t>(rows, at, panel);
    case dsv4::cpu::Stored::e4m3:
      return widen_e4m3(rows, at, scale, panel);
    case dsv4::cpu::Stored::e2m1:
      return widen_e2m1(rows, at, scale, panel);
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
  for (int64_t k = 0; k < call.k; k += kChunk) {
    const int64_t channels = call.k - k < kChunk ? call.k - k : kChunk;
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    staged.copy(rows, bytes_of(weight.format, k), bytes_of(weight.format, channels),
                bytes_of(weight.format, blocks * kBlock));
    for (int64_t block = 0; block < blocks; ++block) {
      float scale[kPanelRows];
      if (weight.scale != nullptr) {
        load_scales(weight, expert, first, last, k + block * kBlock, scale);
      }
      widen(weight.format, staged.rows(), bytes_of(weight.format, block * kBlock), scale,
            panel + block * kBlock * kPanelRows);
    }
    const dsv4::FlushSubnormals flush;
    add_rows<kRowsAtOnce>(x + begin * x_stride + k, x_stride, panel, blocks, sums, end - begin);
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
