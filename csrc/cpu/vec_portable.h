// Eight fp32 lanes without instructions of any one machine: two of the compiler's own vectors of 16
// bytes, which every 64-bit host has (NEON on Arm). What runs where no other vector type does.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Unsigned4 = uint32_t __attribute__((vector_size(16)));
using Short4 = uint16_t __attribute__((vector_size(8)));
using Short8 = uint16_t __attribute__((vector_size(16)));
using Byte16 = uint8_t __attribute__((vector_size(16)));

inline Int4 bits_of(Float4 a) { return __builtin_bit_cast(Int4, a); }
inline Float4 float_of(Int4 a) { return __builtin_bit_cast(Float4, a); }

inline Float4 of_bfloat16(Short4 bits) {
  return __builtin_bit_cast(Float4, __builtin_convertvector(bits, Unsigned4) << 16);
}

// Without an operation that takes or gives subnormals, which may be flushed.
inline Float4 of_half(Short4 bits) {
  const Unsigned4 wide = __builtin_convertvector(bits, Unsigned4);
  const Unsigned4 sign = (wide & 0x8000) << 16, magnitude = (wide & 0x7fff) << 13;
  const auto from = [](Unsigned4 value) { return __builtin_bit_cast(Float4, value); };
  const Float4 small = from(magnitude | (113u << 23)) - 0x1p-14f;  // counts of 2^-24
  const Unsigned4 bias =
      magnitude >= (31u << 23) ? Unsigned4{} + (224u << 23) : Unsigned4{} + (112u << 23);
  const Unsigned4 normal = magnitude + bias;
  const Unsigned4 value = magnitude < (1u << 23) ? __builtin_bit_cast(Unsigned4, small) : normal;
  return from(value | sign);
}

template <class T>
Float4 load_four(const T* from);
template <>
inline Float4 load_four(const float* from) {
  Float4 result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}
template <>
inline Float4 load_four(const dsv4::BFloat16* from) {
  Short4 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return of_bfloat16(bits);
}
template <>
inline Float4 load_four(const dsv4::Half* from) {
  Short4 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return of_half(bits);
}

template <>
inline Float4 load_four(const int32_t* from) {
  Int4 numbers;
  __builtin_memcpy(&numbers, from, sizeof(numbers));
  return __builtin_convertvector(numbers, Float4);
}

template <class T>
inline void store_four(Float4 value, T* to) {
  for (int i = 0; i < 4; ++i) to[i] = dsv4::from_float<T>(value[i]);
}
template <>
inline void store_four(Float4 value, float* to) {
  __builtin_memcpy(to, &value, sizeof(value));
}
template <>
inline void store_four(Float4 value, dsv4::BFloat16* to) {
  const auto bits = __builtin_bit_cast(Unsigned4, value);
  const Unsigned4 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const Unsigned4 kept = value != value ? bits | 0x400000u : rounded;
  const Short4 high = __builtin_convertvector(kept >> 16, Short4);
  __builtin_memcpy(to, &high, sizeof(high));
}

struct Vec {
  static constexpr int lanes = 8;
  Float4 low, high;
  using Bits = Short8;  // 16 of each lane

  static Vec of_half(Bits bits) {
    return {portable::of_half(low_four(bits)), portable::of_half(high_four(bits))};
  }
  static Vec of_bfloat16(Bits bits) {
    return {portable::of_bfloat16(low_four(bits)), portable::of_bfloat16(high_four(bits))};
  }

  static Vec broadcast(float value) {
    const Float4 four = {value, value, value, value};
    return {four, four};
  }

  template <class T>
  static Vec load(const T* from) {
    return {load_four(from), load_four(from + 4)};
  }

  template <class T>
  void store(T* to) const {
    store_four(low, to);
    store_four(high, to + 4);
  }

  float sum() const {
    const Float4 four = low + high;
    return (four[0] + four[2]) + (four[1] + four[3]);
  }

 private:
  static Short4 low_four(Short8 bits) { return __builtin_shufflevector(bits, bits, 0, 1, 2, 3); }
  static Short4 high_four(Short8 bits) { return __builtin_shufflevector(bits, bits, 4, 5, 6, 7); }
};

inline Vec operator*(Vec a, Vec b) { return {a.low * b.low, a.high * b.high}; }
inline Vec operator+(Vec a, Vec b) { return {a.low + b.low, a.high + b.high}; }
// a * b + c; whether the product is rounded is left to the compiler.
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec operator-(Vec a, Vec b) { return {a.low - b.low, a.high - b.high}; }
inline Vec operator/(Vec a, Vec b) { return {a.low / b.low, a.high / b.high}; }

inline Float4 square_root(Float4 a) {
  for (int i = 0; i < 4; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline Vec square_root(Vec a) { return {square_root(a.low), square_root(a.high)}; }

// `a` if it is a NaN, as torch's clamp keeps it.
inline Vec max(Vec a, Vec b) {
  return {b.low > a.low ? b.low : a.low, b.high > a.high ? b.high : a.high};
}
inline Vec min(Vec a, Vec b) {
  return {b.low < a.low ? b.low : a.low, b.high < a.high ? b.high : a.high};
}

inline Float4 absolute(Float4 a) { return float_of(bits_of(a) & INT32_MAX); }
inline Vec absolute(Vec a) { return {absolute(a.low), absolute(a.high)}; }

inline Float4 round_even(Float4 a) {
  const Float4 magnitude = absolute(a);
  const Float4 whole = (magnitude + 0x1p23f) - 0x1p23f;  // above, every number is whole
  return magnitude < 0x1p23f ? float_of(bits_of(whole) | (bits_of(a) & INT32_MIN)) : a;
}
inline Vec round_even(Vec a) { return {round_even(a.low), round_even(a.high)}; }

// a * 2^n of whole numbers n in [-150, 128]; a result below the normal range may be flushed to 0.
inline Float4 times_power_of_two(Float4 a, Float4 n) {
  const Int4 whole = __builtin_convertvector(n, Int4);
  const Int4 half = whole >> 1;
  const Int4 rest = whole - half;
  return a * float_of((half + 127) << 23) * float_of((rest + 127) << 23);
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return {times_power_of_two(a.low, n.low), times_power_of_two(a.high, n.high)};
}

// a * b + c, rounded once.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) {
    c.low[i] = __builtin_fmaf(a.low[i], b.low[i], c.low[i]);
    c.high[i] = __builtin_fmaf(a.high[i], b.high[i], c.high[i]);
  }
  return c;
}

struct VecInt {
  Int4 low, high;

  static VecInt broadcast(int32_t value) {
    const Int4 four = {value, value, value, value};
    return {four, four};
  }
  static VecInt load(const int32_t* from) {
    VecInt result;
    __builtin_memcpy(&result, from, sizeof(result));
    return result;
  }
  void store(int32_t* to) const { __builtin_memcpy(to, this, sizeof(*this)); }

  // Lanes of 0 to 255.
  void store(uint8_t* to) const {
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<uint8_t>(low[i]);
      to[i + 4] = static_cast<uint8_t>(high[i]);
    }
  }

  int32_t largest() const {
    const Int4 four = low > high ? low : high;
    int32_t result = four[0];
    for (int i = 1; i < 4; ++i) result = four[i] > result ? four[i] : result;
    return result;
  }

  int32_t sum() const {
    const Int4 four = low + high;
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
};

inline VecInt bits_of(Vec a) { return {bits_of(a.low), bits_of(a.high)}; }
inline Vec float_of(VecInt a) { return {float_of(a.low), float_of(a.high)}; }
inline VecInt operator+(VecInt a, VecInt b) { return {a.low + b.low, a.high + b.high}; }
inline VecInt operator-(VecInt a, VecInt b) { return {a.low - b.low, a.high - b.high}; }
inline VecInt operator&(VecInt a, VecInt b) { return {a.low & b.low, a.high & b.high}; }
inline VecInt operator|(VecInt a, VecInt b) { return {a.low | b.low, a.high | b.high}; }
inline VecInt max(VecInt a, VecInt b) {
  return {b.low > a.low ? b.low : a.low, b.high > a.high ? b.high : a.high};
}

template <int places>
VecInt shift_right(VecInt a) {
  const auto low = __builtin_bit_cast(Unsigned4, a.low) >> places;
  const auto high = __builtin_bit_cast(Unsigned4, a.high) >> places;
  return {__builtin_bit_cast(Int4, low), __builtin_bit_cast(Int4, high)};
}

struct VecShort {
  static constexpr int lanes = 16;
  // Of each pair of neighbours the first and the second, as wide as their products.
  Int4 first[2], second[2];

  static VecShort of(const Int4 (&pairs)[2]) {
    return {{pairs[0] << 16 >> 16, pairs[1] << 16 >> 16}, {pairs[0] >> 16, pairs[1] >> 16}};
  }
  static VecShort load(const int16_t* from) {
    Int4 pairs[2];
    __builtin_memcpy(pairs, from, sizeof(pairs));
    return of(pairs);
  }
  static VecShort broadcast_pair(const int16_t* from) {
    const Int4 low = {from[0], from[0], from[0], from[0]};
    const Int4 high = {from[1], from[1], from[1], from[1]};
    return {{low, low}, {high, high}};
  }
  static VecShort load(const int8_t* from) {
    int16_t wide[lanes];
    for (int i = 0; i < lanes; ++i) wide[i] = from[i];
    return load(wide);
  }
  void store(int16_t* to) const {
    for (int half = 0; half < 2; ++half) {
      const Int4 pairs = (first[half] & 0xffff) | second[half] << 16;
      __builtin_memcpy(to + half * lanes / 2, &pairs, sizeof(pairs));
    }
  }
};

// sum + products of lanes, each pair of neighbours added.
inline VecInt add_pairs(VecInt sum, VecShort a, VecShort b) {
  return sum + VecInt{a.first[0] * b.first[0] + a.second[0] * b.second[0],
                      a.first[1] * b.first[1] + a.second[1] * b.second[1]};
}

// Lane i of the result is lane i ^ distance: 1, 2 or 4.
template <int distance>
Vec exchange(Vec a) {
  if constexpr (distance == 4) {
    return {a.high, a.low};
  } else {
    constexpr int d = distance;
    return {Float4{a.low[d], a.low[1 ^ d], a.low[2 ^ d], a.low[3 ^ d]},
            Float4{a.high[d], a.high[1 ^ d], a.high[2 ^ d], a.high[3 ^ d]}};
  }
}

// Vectors of bytes, and tables that they look up in by codes from 0 to 15.
constexpr int kCodeLanes = 1;  // of 16 bytes
using CodeVector = Byte16;
using CodeTable = Byte16;

inline CodeVector look_up(CodeTable table, CodeVector codes) {
  return __builtin_shuffle(table, codes);
}
