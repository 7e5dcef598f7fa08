#include "cpu/cache_bytes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/threads.h"
#include "cpu/thread_buffer.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kTile = 64;          // channels per scale of latent rows
constexpr int64_t kRowsPerThread = 8;  // below, a second thread costs more than it saves
constexpr float kE4m3Max = 448;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t tiles_of(const PageLayout& layout) {
  return (layout.channels - layout.rope + kTile - 1) / kTile;
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Nearest even within +-448; every NaN is 0x7F.
uint8_t to_e4m3(float value) {
  if (std::isnan(value)) {
    return 0x7f;
  }
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 24 & 0x80u;
  const float magnitude = std::min(std::fabs(value), kE4m3Max);
  if (magnitude < 0x1p-6f) {  // counts 2^-9, the last bit of 2^14
    const auto sum = std::bit_cast<uint32_t>(magnitude + 0x1p14f);
    return static_cast<uint8_t>(sign | (sum - std::bit_cast<uint32_t>(0x1p14f)));
  }
  const auto bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0x7ffffu + (bits >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

float from_e4m3(uint8_t code) {
  if ((code & 0x7f) == 0x7f) {
    return kNan;
  }
  const auto half = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7);
  return to_float(Half{half}) * 0x1p8f;  // of another exponent bias
}

// NaN if there is one.
float largest_magnitude(const float* x, int64_t count) {
  float largest = 0;
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    nan |= std::isnan(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  return nan ? kNan : largest;
}

template <class T>
void put(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

template <class T>
T get(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

BFloat16 one_nan(float value) {
  return std::isnan(value) ? BFloat16{0x7fc0} : from_float<BFloat16>(value);
}

// The power of two of some channels, whose codes are written.
uint8_t encode_block(const float* x, int64_t count, uint8_t* codes) {
  const float amax = largest_magnitude(x, count);
  const uint8_t byte = e8m0_above((amax < 1e-4f ? 1e-4f : amax) * (1 / kE4m3Max));
  const float scale = e8m0_value(byte);
  for (int64_t i = 0; i < count; ++i) codes[i] = to_e4m3(x[i] / scale);
  return byte;
}

void encode_tiles(const PageLayout& layout, const float* x, uint8_t* values, uint8_t* scales) {
  const int64_t channels = layout.channels - layout.rope;
  for (int64_t tile = 0; tile < tiles_of(layout); ++tile) {
    const int64_t first = tile * kTile;
    const uint8_t byte = encode_block(x + first, std::min(kTile, channels - first), values + first);
    if (layout.codec == RowCodec::tiles_e8m0) {
      scales[tile] = byte;
    } else {
      put(scales + 2 * tile, one_nan(e8m0_value(byte)));
    }
  }
}

void encode_token_fp8(const float* x, int64_t count, uint8_t* values, uint8_t* scale) {
  float amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    amax = std::isfinite(x[i]) ? std::max(amax, std::fabs(x[i])) : amax;
  }
  const float factor = amax * (1 / kE4m3Max), inverse = 1 / factor;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * inverse;
    const float value = std::isfinite(scaled) ? scaled : x[i];
    values[i] = to_e4m3(std::isfinite(x[i]) ? value : kNan);
  }
  put(scale, factor);
}

void encode_int8(const float* x, int64_t count, uint8_t* values, uint8_t* scale) {
  const float amax = largest_magnitude(x, count);
  const float factor = std::isfinite(amax) ? amax / 127 : kNan;
  for (int64_t i = 0; i < count; ++i) {
    const float steps = factor > 0 ? std::nearbyint(x[i] / factor) : 0;
    values[i] = static_cast<uint8_t>(static_cast<int8_t>(std::clamp(steps, -127.0f, 127.0f)));
  }
  put(scale, from_float<Half>(factor > 65504 ? 65504 : factor));
}

void encode(const PageLayout& layout, const float* x, uint8_t* page, int64_t entry) {
  uint8_t* values = page + layout.values.first + entry * layout.values.stride;
  uint8_t* scales = page + layout.scales.first + entry * layout.scales.stride;
  switch (layout.codec) {
    case RowCodec::tiles_e8m0:
    case RowCodec::tiles_bf16:
      encode_tiles(layout, x, values, scales);
      break;
    case RowCodec::row_fp8: {
      const float scale = e8m0_value(encode_block(x, layout.channels, values));
      put(scales, std::isnan(scale) ? kNan : scale);
      break;
    }
    case RowCodec::token_fp8:
      encode_token_fp8(x, layout.channels, values, scales);
      break;
    case RowCodec::token_int8:
      encode_int8(x, layout.channels, values, scales);
      break;
  }
  uint8_t* rotated = page + layout.rotated.first + entry * layout.rotated.stride;
  for (int64_t i = 0; i < layout.rope; ++i) {
    put(rotated + 2 * i, one_nan(x[layout.channels - layout.rope + i]));
  }
  std::memset(page + layout.zeros.first + entry * layout.zeros.stride, 0,
              static_cast<size_t>(layout.zero_bytes));
}

float scale_at(const PageLayout& layout, const uint8_t* scales, int64_t tile) {
  switch (layout.codec) {
    case RowCodec::tiles_e8m0:
      return e8m0_value(scales[tile]);
    case RowCodec::tiles_bf16:
      return to_float(get<BFloat16>(scales + 2 * tile));
    case RowCodec::token_int8:
      return to_float(get<Half>(scales));
    default:
      return get<float>(scales);
  }
}

void decode(const PageLayout& layout, const uint8_t* page, int64_t entry, float* x) {
  const uint8_t* values = page + layout.values.first + entry * layout.values.stride;
  const uint8_t* scales = page + layout.scales.first + entry * layout.scales.stride;
  const int64_t channels = layout.channels - layout.rope;
  const bool tiles = layout.codec <= RowCodec::tiles_bf16;
  const int64_t width = tiles ? kTile : channels;
  for (int64_t first = 0; first < channels; first += width) {
    const float scale = scale_at(layout, scales, first / width);
    for (int64_t i = first; i < std::min(channels, first + width); ++i) {
      const float value = layout.codec == RowCodec::token_int8
                              ? static_cast<float>(static_cast<int8_t>(values[i]))
                              : from_e4m3(values[i]);
      x[i] = value * scale;
    }
  }
  const uint8_t* rotated = page + layout.rotated.first + entry * layout.rotated.stride;
  for (int64_t i = 0; i < layout.rope; ++i) {
    x[channels + i] = to_float(get<BFloat16>(rotated + 2 * i));
  }
}

template <class X>
void widen_as(const char* from, int64_t count, float* to) {
  std::transform(reinterpret_cast<const X*>(from), reinterpret_cast<const X*>(from) + count, to,
                 [](X value) { return to_float(value); });
}

void widen(DType dtype, const char* from, int64_t count, float* to) {
  DSV4_FOR_DTYPE(dtype, widen_as, from, count, to);
}

}  // namespace

PageLayout layout_fp8_ds_mla(int64_t channels, int64_t rope, int64_t block_size) {
  PageLayout layout{RowCodec::tiles_e8m0, channels, rope, block_size, {}, {}, {}, {}};
  const int64_t nope = channels - rope, data = nope + 2 * rope;
  layout.values = {0, data};
  layout.rotated = {nope, data};
  layout.scales = {block_size * data, round_up(tiles_of(layout), 8)};
  return layout;
}

PageLayout layout_a5(int64_t channels, int64_t rope, int64_t block_size) {
  PageLayout layout{RowCodec::tiles_e8m0, channels, rope, block_size, {}, {}, {}, {}};
  const int64_t scales = channels + rope, entry = round_up(scales + tiles_of(layout), 128);
  layout.rotated = {0, entry};
  layout.values = {2 * rope, entry};
  layout.scales = {scales, entry};
  return layout;
}

PageLayout layout_kv_epilog(int64_t channels, int64_t rope, int64_t block_size) {
  PageLayout layout{RowCodec::tiles_bf16, channels, rope, block_size, {}, {}, {}, {}};
  const int64_t scales = channels + rope, data = scales + 2 * tiles_of(layout);
  const int64_t entry = round_up(data, 32);
  layout.rotated = {0, entry};
  layout.values = {2 * rope, entry};
  layout.scales = {scales, entry};
  layout.zeros = {data, entry};
  layout.zero_bytes = entry - data;
  return layout;
}

PageLayout layout_keys(RowCodec codec, int64_t channels, int64_t block_size) {
  const int64_t scale = codec == RowCodec::token_int8 ? 2 : 4;
  return {codec, channels, 0, block_size, {0, channels}, {block_size * channels, scale}, {}, {}};
}

uint8_t* EntrySlots::page(int64_t i, int64_t* entry) const {
  const int64_t slot = slots[i * slots_stride], block = slot / layout.block_size;
  if (slot < 0 || block >= num_blocks) {
    return nullptr;
  }
  *entry = slot - block * layout.block_size;
  return cache + block * page_stride;
}

void write_entries(const EntrySlots& to, DType dtype, const char* rows, int64_t rows_stride) {
  parallel_for(to.count, kRowsPerThread, [&](int64_t begin, int64_t end) {
    thread_local ThreadBuffer buffer;
    auto* wide = buffer.of<float>(to.layout.channels);
    for (int64_t i = begin; i < end; ++i) {
      int64_t entry = 0;
      if (uint8_t* page = to.page(i, &entry)) {
        widen(dtype, rows + i * rows_stride, to.layout.channels, wide);
        encode(to.layout, wide, page, entry);
      }
    }
  });
}

void read_entries(const EntrySlots& from, float* rows) {
  parallel_for(from.count, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = rows + i * from.layout.channels;
      int64_t entry = 0;
      if (const uint8_t* page = from.page(i, &entry)) {
        decode(from.layout, page, entry, row);
      } else {
        std::fill(row, row + from.layout.channels, 0.0f);
      }
    }
  });
}

}  // namespace dsv4::cpu
