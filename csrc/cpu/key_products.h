// Dot products of keys with many query heads: lanes are heads, so nothing is summed across lanes.
// Included by rows headers inside a namespace after a `Vec`, so it has no guard and includes
// nothing but the transposition.
//
// Heads are packed in panels of two vectors, the last of one if that is enough: channel by channel
// the values of a panel's heads. A dot product is one chain over the channels, the same in a block
// of any size.

#include "cpu/transpose.h"

// Channels at a time, so that a panel's part stays in the first-level cache.
constexpr int64_t kChannelsAtOnce = 256;
// Rows of a block of sums: two vectors each in 12 or 24 registers.
constexpr int kBlockRows = Vec::lanes == 16 ? 12 : 6;

inline int64_t padded_heads(int64_t heads) {
  return (heads + Vec::lanes - 1) / Vec::lanes * Vec::lanes;
}

// Heads of a panel that starts `rest` heads before the end.
inline int64_t panel_width(int64_t rest) { return rest > Vec::lanes ? 2 * Vec::lanes : Vec::lanes; }

// Four values of four heads become four heads of four channels.
inline void transpose_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Lanes<uint32_t> block[4];
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&block[i], from + i * from_stride, 16);
  transpose<uint32_t, 4>(block);
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &block[i], 16);
}

// q: [heads, channels], rows `stride` elements apart. panels: [padded heads * channels].
template <class X>
void pack_heads(const X* q, int64_t stride, int64_t heads, int64_t channels, float* panels) {
  constexpr int64_t some = 16;  // channels at a time
  float wide[2 * Vec::lanes][some] = {};
  for (int64_t first = 0; first < heads; first += 2 * Vec::lanes) {
    const int64_t width = panel_width(heads - first);
    const int64_t present = heads - first < width ? heads - first : width;
    for (int64_t lane = present; lane < width; ++lane) {
      for (float& value : wide[lane]) value = 0.0f;
    }
    float* panel = panels + first * channels;
    for (int64_t c = 0; c < channels; c += some) {
      const int64_t count = channels - c < some ? channels - c : some;
      for (int64_t lane = 0; lane < present; ++lane) {
        const X* from = q + (first + lane) * stride + c;
        for (int64_t i = 0; i < some; i += Vec::lanes) {
          load_first(from + i, count > i ? count - i : 0).store(wide[lane] + i);
        }
      }
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
        for (int64_t lane = 0; lane < width; lane += 4) {
          transpose_four(wide[lane] + i, some, panel + (c + i) * width + lane, width);
        }
      }
      for (; i < count; ++i) {
        for (int64_t lane = 0; lane < width; ++lane) panel[(c + i) * width + lane] = wide[lane][i];
      }
    }
  }
}

// Into the second-level cache, while others are multiplied.
inline void prefetch_rows(const char* const* rows, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; rows[i] != nullptr && at < bytes; at += 64) {
      __builtin_prefetch(rows[i] + at, 0, 2);
    }
  }
}

// sums[row][head of the panel] (+)= keys[row] . head, over `channels` channels.
template <int rows, int vectors>
void multiply_block(const float* keys, int64_t key_stride, const float* panel, int64_t channels,
                    bool first, float* sums, int64_t sums_stride) {
  constexpr int lanes = Vec::lanes;
  Vec sum[rows][vectors];
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = first ? Vec::broadcast(0.0f) : Vec::load(sums + r * sums_stride + v * lanes);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec head[vectors];
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) head[v] = Vec::load(panel + (c * vectors + v) * lanes);
    DSV4_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec key = Vec::broadcast(keys[r * key_stride + c]);
      DSV4_UNROLL
      for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(key, head[v], sum[r][v]);
    }
  }
  DSV4_UNROLL
  for (int r = 0; r < rows; ++r) {
    DSV4_UNROLL
    for (int v = 0; v < vectors; ++v) sum[r][v].store(sums + r * sums_stride + v * lanes);
  }
}

template <int vectors>
void multiply_panel(const float* keys, int64_t count, int64_t key_stride, const float* panel,
                    int64_t channels, bool first, float* sums, int64_t sums_stride) {
  int64_t k = 0;
  for (; k + kBlockRows <= count; k += kBlockRows) {
    multiply_block<kBlockRows, vectors>(keys + k * key_stride, key_stride, panel, channels, first,
                                        sums + k * sums_stride, sums_stride);
  }
  for (; k + 4 <= count; k += 4) {
    multiply_block<4, vectors>(keys + k * key_stride, key_stride, panel, channels, first,
                               sums + k * sums_stride, sums_stride);
  }
  for (; k < count; ++k) {
    multiply_block<1, vectors>(keys + k * key_stride, key_stride, panel, channels, first,
                               sums + k * sums_stride, sums_stride);
  }
}

// sums [count, sums_stride] = keys [count, key_stride] . panels, for all padded heads.
inline void multiply_keys(const float* keys, int64_t count, int64_t key_stride, const float* panels,
                          int64_t heads, int64_t channels, float* sums, int64_t sums_stride) {
  for (int64_t h = 0; h < heads; h += 2 * Vec::lanes) {
    const int64_t width = panel_width(heads - h);
    for (int64_t c = 0; c < channels; c += kChannelsAtOnce) {
      const int64_t some = channels - c < kChannelsAtOnce ? channels - c : kChannelsAtOnce;
      const float* panel = panels + h * channels + c * width;
      if (width == Vec::lanes) {
        multiply_panel<1>(keys + c, count, key_stride, panel, some, c == 0, sums + h, sums_stride);
      } else {
        multiply_panel<2>(keys + c, count, key_stride, panel, some, c == 0, sums + h, sums_stride);
      }
    }
  }
}
