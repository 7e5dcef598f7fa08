// Element types that kernels read and write, and their conversions from and to fp32.
#pragma once

#include <bit>
#include <cstdint>

namespace dsv4 {

enum class DType : uint8_t { f32, bf16, f16 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t wide = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) {
    wide += 112u << 23;
  } else if (magnitude <
             0x0400u) {  // m * 2^-24, by a subtraction that also works where subnormals are flushed
    wide = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude | 0x3f000000u) - 0.5f);
  }
  return std::bit_cast<float>(wide | sign);
}

// Rounds to nearest, ties to even.
template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>(bits >> 16 | 0x0040u)};  // a NaN stays one when its low bits go
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = 0x7c00u;  // 65520 and above round to infinity
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude <
             0x38800000u) {  // below 2^-14 the result counts 2^-24, which is the last bit of 0.5
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else if (magnitude < 0x477ff000u) {
    const uint32_t rebiased = magnitude - (112u << 23);
    half = (rebiased + 0x0fffu + (rebiased >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// 2^(byte - 127), and NaN of 255: the value of an E8M0 scale.
inline float e8m0_value(uint8_t byte) {
  const uint32_t subnormal_or_nan = byte == 0 || byte == 255 ? 0x00400000u : 0u;
  return std::bit_cast<float>(uint32_t{byte} << 23 | subnormal_or_nan);
}

// The E8M0 byte of the smallest power of two that is at least `value`, positive and normal; 255 of
// infinity and NaN.
inline uint8_t e8m0_above(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t up = (bits >> 23 & 255u) + ((bits & 0x7fffffu) != 0 ? 1 : 0);
  return static_cast<uint8_t>(up > 255u ? 255u : up);
}

}  // namespace dsv4

// Returns function<X>(arguments) of the element type X that `dtype` names.
#define DSV4_FOR_DTYPE(dtype, function, ...)          \
  switch (dtype) {                                    \
    case ::dsv4::DType::f32:                          \
      return function<float>(__VA_ARGS__);            \
    case ::dsv4::DType::bf16:                         \
      return function<::dsv4::BFloat16>(__VA_ARGS__); \
    case ::dsv4::DType::f16:                          \
      return function<::dsv4::Half>(__VA_ARGS__);     \
  }
