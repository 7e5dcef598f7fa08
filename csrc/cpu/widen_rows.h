// Stored weights as fp32: 16 rows by 32 channels, one channel's 16 values after the other's.
// Included by rows headers inside a namespace after transpose.h, so it includes nothing and has no
// guard.

constexpr int kPanelRows = 16;  // rows of W in an AMX tile; two vectors of AVX2, one of AVX-512
constexpr int kBlock = 32;      // channels between two running sums
constexpr int kPanelVectors = kPanelRows / Vec::lanes;

// Where the bytes of 16 rows of W begin.
struct PanelRows {
  const uint8_t* row[kPanelRows];
};

// Channels widened at a time: of a panel, 16 KiB of fp32, half of a first-level cache. Four panels
// are more than it holds, but measured no slower than four of half as many channels.
constexpr int kChunk = 256;

// The same bytes of 16 rows beside each other, zeros behind them up to a multiple of 32 channels.
// Rows of a power of two bytes fall into the same sets of a cache, which has fewer ways than 16.
struct Staged {
  static constexpr int kPitch = kChunk * sizeof(float) + 64;
  alignas(64) uint8_t bytes[kPanelRows * kPitch];

  void copy(const PanelRows& from, int64_t at, int64_t count, int64_t padded) {
    for (int i = 0; i < kPanelRows; ++i) {
      uint8_t* to = bytes + i * kPitch;
      __builtin_memcpy(to, from.row[i] + at, static_cast<size_t>(count));
      __builtin_memset(to + count, 0, static_cast<size_t>(padded - count));
    }
  }

  // Of the next chunk the part of one of this one's blocks: the rows are too many streams for the
  // machine to foresee, and all lines asked for at once are waited for.
  static void prefetch(const PanelRows& from, int64_t at, int64_t count, int64_t block,
                       int64_t blocks) {
    for (int64_t i = block * kPanelRows / blocks; i < (block + 1) * kPanelRows / blocks; ++i) {
      for (int64_t line = 0; line < count; line += 64) {
        __builtin_prefetch(from.row[i] + at + line);
      }
    }
  }

  PanelRows rows() const {
    PanelRows result;
    for (int i = 0; i < kPanelRows; ++i) result.row[i] = bytes + i * kPitch;
    return result;
  }
};

// Rows transposed at a time in each lane: a vector and its copy of each are registers. With two
// lanes the second has the other eight rows, with one they are another group.
constexpr int kGroup = 8;
constexpr int kGroups = kPanelRows / kGroup / kCodeLanes;

template <class T>
using Codes = Lanes<T, kCodeLanes>;

// A lane from each address, or one from the first.
template <class T, int lanes = kCodeLanes>
[[gnu::always_inline]] inline Lanes<T, lanes> load_lanes(const uint8_t* first,
                                                         const uint8_t* second) {
  Lanes<uint8_t> low, high;
  __builtin_memcpy(&low, first, sizeof(low));
  if constexpr (lanes == 1) {
    return __builtin_bit_cast(Lanes<T>, low);
  } else {
    __builtin_memcpy(&high, second, sizeof(high));
    return join<T, lanes>(low, high);
  }
}

// 16 bytes of a group's rows, transposed: the first channel of all rows, then the second.
template <class T>
[[gnu::always_inline]] inline void load_columns(const PanelRows& rows, int group, int64_t at,
                                                Codes<T> (&block)[kGroup]) {
  DSV4_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    block[i] = load_lanes<T>(rows.row[group * kGroup + i] + at,
                             rows.row[(group + kCodeLanes - 1) * kGroup + i] + at);
  }
  transpose<T, kGroup, kCodeLanes>(block);
}

using Bits16 = Codes<uint16_t>;

// Calls emit(channel, vector of the panel, values) for the values of a channel that `bits` are, 16
// each: halves, or the high halves of fp32.
template <bool half, int lanes = kCodeLanes, class Emit>
[[gnu::always_inline]] inline void emit_channel(const Lanes<uint16_t, lanes>& bits, int group,
                                                int channel, const Emit& emit) {
  const auto widened = [](const auto& part) __attribute__((always_inline)) {
    const auto raw = __builtin_bit_cast(Vec::Bits, part);
    return half ? Vec::of_half(raw) : Vec::of_bfloat16(raw);
  };
  if constexpr (sizeof(bits) == sizeof(Vec::Bits)) {
    emit(channel, group, widened(bits));
  } else {
    emit(channel, 0, widened(low_lane<lanes>(bits)));
    emit(channel, 1, widened(high_lane<lanes>(bits)));
  }
}

// Channels of 16-bit floats.
template <bool half, class Emit>
[[gnu::always_inline]] inline void each_short(const PanelRows& rows, int64_t at, const Emit& emit) {
  for (int group = 0; group < kGroups; ++group) {
    for (int from = 0; from < kBlock; from += kPerLane<uint16_t>) {
      Codes<uint16_t> block[kGroup];
      load_columns<uint16_t>(rows, group, at + 2 * from, block);
      DSV4_UNROLL
      for (int i = 0; i < kGroup; ++i) emit_channel<half>(block[i], group, from + i, emit);
    }
  }
}

// Channels of fp32.
template <class Emit>
[[gnu::always_inline]] inline void each_float(const PanelRows& rows, int64_t at, const Emit& emit) {
  float panel[kBlock][kPanelRows];
  constexpr int count = kPerLane<float>;  // channels in 16 bytes, and rows transposed at a time
  for (int first = 0; first < kPanelRows; first += count) {
    for (int from = 0; from < kBlock; from += count) {
      Lanes<uint32_t> block[count];
      DSV4_UNROLL
      for (int i = 0; i < count; ++i) {
        __builtin_memcpy(&block[i], rows.row[first + i] + at + 4 * from, 16);
      }
      transpose<uint32_t, count>(block);
      DSV4_UNROLL
      for (int i = 0; i < count; ++i) __builtin_memcpy(&panel[from + i][first], &block[i], 16);
    }
  }
  // Read when all are written, because a load that spans two recent stores waits for both.
  for (int i = 0; i < kBlock; ++i) {
    DSV4_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) emit(i, v, Vec::load(panel[i] + v * Vec::lanes));
  }
}

// Whether a code among 16 rows of 16 bytes is e4m3's NaN.
[[gnu::always_inline]] inline bool has_e4m3_nan(const Codes<uint8_t> (&block)[kGroup]) {
  Codes<uint8_t> above{};
  DSV4_UNROLL
  for (int i = 0; i < kGroup; ++i) above |= (block[i] & 0x7f) + 1;
  uint64_t bits[sizeof(above) / sizeof(uint64_t)], any = 0;
  __builtin_memcpy(bits, &above, sizeof(above));
  for (const uint64_t some : bits) any |= some;
  return (any & 0x8080808080808080u) != 0;
}

// Codes above a zero byte as halves, whose exponents are short by 8.
template <bool nan>
[[gnu::always_inline]] inline Bits16 e4m3_halves(const Codes<uint8_t>& codes) {
  using Signed = Codes<int16_t>;
  const Signed half = (__builtin_bit_cast(Signed, codes) >> 1) & static_cast<int16_t>(0xbfff);
  if constexpr (!nan) return __builtin_bit_cast(Bits16, half);
  const Signed infinite = ((half & 0x7fff) == 0x3f80) & static_cast<int16_t>(0x7c00);
  return __builtin_bit_cast(Bits16, half | infinite);
}

template <bool nan, class Emit>
[[gnu::always_inline]] inline void each_e4m3_column(const Codes<uint8_t> (&block)[kGroup],
                                                    int group, int from, const Emit& emit) {
  DSV4_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    Codes<uint8_t> low, high;
    interleave<uint8_t, kCodeLanes>(Codes<uint8_t>{}, block[i], &low, &high);
    emit_channel<true>(e4m3_halves<nan>(low), group, from + 2 * i, emit);
    emit_channel<true>(e4m3_halves<nan>(high), group, from + 2 * i + 1, emit);
  }
}

// Channels of e4m3 codes, 2^-8 of their values.
template <class Emit>
[[gnu::always_inline]] inline void each_e4m3(const PanelRows& rows, int64_t at, const Emit& emit) {
  for (int group = 0; group < kGroups; ++group) {
    for (int from = 0; from < kBlock; from += kPerLane<uint8_t>) {
      Codes<uint8_t> block[kGroup];
      load_columns<uint8_t>(rows, group, at + from, block);
      if (has_e4m3_nan(block)) [[unlikely]] {
        each_e4m3_column<true>(block, group, from, emit);
      } else {
        each_e4m3_column<false>(block, group, from, emit);
      }
    }
  }
}

// The bytes of the high half of fp32 by e2m1 code, 2^-8 of its value.
constexpr Lanes<uint8_t> kE2m1High = {0,    0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                      0x80, 0xbb, 0xbb, 0xbb, 0xbc, 0xbc, 0xbc, 0xbc};
constexpr Lanes<uint8_t> kE2m1Low = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0,
                                     0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};

[[gnu::always_inline]] inline Codes<uint8_t> by_nibble(const Lanes<uint8_t>& table,
                                                       const Codes<uint8_t>& nibbles) {
  return __builtin_bit_cast(Codes<uint8_t>, look_up(__builtin_bit_cast(CodeTable, table),
                                                    __builtin_bit_cast(CodeVector, nibbles)));
}

// Channels of e2m1 codes, 2^-8 of their values: a byte holds two, the even one in its low nibble.
template <class Emit>
[[gnu::always_inline]] inline void each_e2m1(const PanelRows& rows, int64_t at, const Emit& emit) {
  for (int group = 0; group < kGroups; ++group) {
    Codes<uint8_t> block[kGroup];
    load_columns<uint8_t>(rows, group, at, block);
    DSV4_UNROLL
    for (int i = 0; i < kGroup; ++i) {  // of two bytes the even and the odd channel
      const Codes<uint8_t> nibbles[2] = {block[i] & 0x0f, block[i] >> 4};
      Codes<uint8_t> bits[2][2];
      DSV4_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        interleave<uint8_t, kCodeLanes>(by_nibble(kE2m1Low, nibbles[odd]),
                                        by_nibble(kE2m1High, nibbles[odd]), &bits[0][odd],
                                        &bits[1][odd]);
      }
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) {
        emit_channel<false>(__builtin_bit_cast(Bits16, bits[c / 2][c % 2]), group, 4 * i + c, emit);
      }
    }
  }
}
