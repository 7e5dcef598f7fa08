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

// Channels widened at a time: 16 KiB of fp32, half of a first-level cache.
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
      // The next chunk: the rows are too many streams for the machine to foresee.
      for (int64_t ahead = 0; ahead < count; ahead += 64) {
        __builtin_prefetch(from.row[i] + at + count + ahead);
      }
    }
  }

  PanelRows rows() const {
    PanelRows result;
    for (int i = 0; i < kPanelRows; ++i) result.row[i] = bytes + i * kPitch;
    return result;
  }
};

// Bits of 32 channels of 16 rows, one channel's after the other's. They are read when all are
// written, because a load that spans two recent stores waits for both.
template <class Bits>
struct PanelBits {
  Bits channel[kBlock][kPanelRows];
};

constexpr int kGroup =
    8;  // rows transposed at a time: eight vectors and their copies are registers

// 16 bytes of 8 rows from row `first` on, transposed: the first channel of the 8, then the second.
template <class T, int rows>
[[gnu::always_inline]] inline void load_columns(const PanelRows& panel, int first, int64_t at,
                                                Vector16<T> (&block)[rows]) {
  DSV4_UNROLL
  for (int i = 0; i < rows; ++i) __builtin_memcpy(&block[i], panel.row[first + i] + at, 16);
  transpose<T, rows>(block);
}

// Channels of floats: their bits.
template <class T>
void load_bits(const PanelRows& rows, int64_t at, PanelBits<T>& bits) {
  constexpr int count = Lanes16<T>::count;  // channels in 16 bytes, and rows transposed at a time
  for (int first = 0; first < kPanelRows; first += count) {
    for (int from = 0; from < kBlock; from += count) {
      Vector16<T> block[count];
      load_columns<T, count>(rows, first, at + from * static_cast<int64_t>(sizeof(T)), block);
      DSV4_UNROLL
      for (int i = 0; i < count; ++i) {
        __builtin_memcpy(&bits.channel[from + i][first], &block[i], 16);
      }
    }
  }
}

using Bits16 = Vector16<uint16_t>;

// e4m3 codes in 16 bits each: the high bits of a half with another exponent bias.
[[gnu::always_inline]] inline Bits16 e4m3_halves(const Vector16<uint8_t>& bytes) {
  Bits16 code;
  __builtin_memcpy(&code, &bytes, sizeof(code));
  const Bits16 magnitude = code & 0x7f;
  const Bits16 nan = magnitude == 0x7f ? Bits16{} + 0x7c00 : Bits16{};
  return (code & 0x80) << 8 | magnitude << 7 | nan;
}

inline void load_e4m3(const PanelRows& rows, int64_t at, PanelBits<uint16_t>& bits) {
  for (int first = 0; first < kPanelRows; first += kGroup) {
    for (int from = 0; from < kBlock; from += 16) {
      Vector16<uint8_t> block[kGroup];
      load_columns<uint8_t, kGroup>(rows, first, at + from, block);
      DSV4_UNROLL
      for (int i = 0; i < kGroup; ++i) {  // a byte, and a zero above it
        Vector16<uint8_t> low, high;
        interleave(block[i], Vector16<uint8_t>{}, &low, &high);
        const Bits16 even = e4m3_halves(low), odd = e4m3_halves(high);
        __builtin_memcpy(&bits.channel[from + 2 * i][first], &even, sizeof(even));
        __builtin_memcpy(&bits.channel[from + 2 * i + 1][first], &odd, sizeof(odd));
      }
    }
  }
}

// High bytes of halves by e2m1 code: the same sign and fraction, and another exponent bias.
constexpr Vector16<uint8_t> kE2m1 = {0,    0x02, 0x04, 0x06, 0x08, 0x0a, 0x0c, 0x0e,
                                     0x80, 0x82, 0x84, 0x86, 0x88, 0x8a, 0x8c, 0x8e};

// A byte holds two channels, the even one in its low nibble.
inline void load_e2m1(const PanelRows& rows, int64_t at, PanelBits<uint16_t>& bits) {
  for (int first = 0; first < kPanelRows; first += kGroup) {
    Vector16<uint8_t> block[kGroup];
    load_columns<uint8_t, kGroup>(rows, first, at, block);
    DSV4_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const Vector16<uint8_t> nibbles[2] = {block[i] & 0x0f, block[i] >> 4};
      DSV4_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        Vector16<uint8_t> low, high;
        interleave(Vector16<uint8_t>{}, __builtin_shuffle(kE2m1, nibbles[odd]), &low, &high);
        __builtin_memcpy(&bits.channel[4 * i + odd][first], &low, sizeof(low));
        __builtin_memcpy(&bits.channel[4 * i + 2 + odd][first], &high, sizeof(high));
      }
    }
  }
}

// Halves whose exponents are short by log2 of `bias`, times the scale of each row.
inline void store_scaled(const PanelBits<uint16_t>& bits, float bias,
                         const float (&scale)[kPanelRows], float* panel) {
  for (int i = 0; i < kBlock; ++i) {
    dsv4::Half halves[kPanelRows];
    __builtin_memcpy(halves, bits.channel[i], sizeof(halves));
    DSV4_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      // Two products: the scale may be 2^127.
      const Vec value = Vec::load(halves + v * Vec::lanes) * Vec::broadcast(bias);
      (value * Vec::load(scale + v * Vec::lanes)).store(panel + i * kPanelRows + v * Vec::lanes);
    }
  }
}

constexpr float kE4m3Bias = 0x1p8f;
constexpr float kE2m1Bias = 0x1p14f;

inline void widen_e4m3(const PanelRows& rows, int64_t at, const float (&scale)[kPanelRows],
                       float* panel) {
  PanelBits<uint16_t> bits;
  load_e4m3(rows, at, bits);
  store_scaled(bits, kE4m3Bias, scale, panel);
}

inline void widen_e2m1(const PanelRows& rows, int64_t at, const float (&scale)[kPanelRows],
                       float* panel) {
  PanelBits<uint16_t> bits;
  load_e2m1(rows, at, bits);
  store_scaled(bits, kE2m1Bias, scale, panel);
}

// T: a type with the bits of one float.
template <class T, class Bits>
void widen_floats(const PanelRows& rows, int64_t at, float* panel) {
  PanelBits<Bits> bits;
  load_bits(rows, at, bits);
  for (int i = 0; i < kBlock; ++i) {
    T values[kPanelRows];
    __builtin_memcpy(values, bits.channel[i], sizeof(values));
    DSV4_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      Vec::load(values + v * Vec::lanes).store(panel + i * kPanelRows + v * Vec::lanes);
    }
  }
}
