// Number formats of blocks with one power-of-two scale: e4m3 and e2m1 under E8M0 (spec/v4.md 6.1,
// 6.2). Included by foreach_isa.h after vec_math.h, so it includes nothing and has no guard.

struct E4m3 {
  static constexpr int codes_in_a_byte = 1;
  static constexpr int mantissa = 3;  // bits
  static constexpr float smallest_normal = 0x1p-6f;
  static constexpr float largest = 448.0f;
  static constexpr float floor = 1e-4f;    // of a block's largest magnitude
  static constexpr int sign = 0x80;        // bit of a code
  static constexpr int not_finite = 0x7f;  // code of every element of a block with a NaN scale
};

struct E2m1 {
  static constexpr int codes_in_a_byte = 2;
  static constexpr int mantissa = 1;
  static constexpr float smallest_normal = 1.0f;
  static constexpr float largest = 6.0f;
  static constexpr float floor = 6 * 0x1p-126f;
  static constexpr int sign = 0x08;
  static constexpr int not_finite = 0x00;
};

constexpr int kNanScale = 255;

// 2^k whose unit of the last place is the distance between the format's values around `magnitude`:
// adding it rounds to them, ties to even.
template <class Format>
Vec rounding_base(Vec magnitude) {
  const Vec power = float_of(bits_of(magnitude) & VecInt::broadcast(0x7f800000));
  constexpr float steps = 1 << (23 - Format::mantissa);
  return max(power, Vec::broadcast(Format::smallest_normal)) * Vec::broadcast(steps);
}

// Codes of ratios whose magnitude is at most the format's largest value.
template <class Format>
VecInt encode(Vec ratio) {
  constexpr int places = 23 - Format::mantissa;
  constexpr float least = Format::smallest_normal * (1 << places);
  const Vec magnitude = absolute(ratio);
  const Vec base = rounding_base<Format>(magnitude);
  const VecInt steps = bits_of(magnitude + base) - bits_of(base);
  const VecInt exponent = shift_right<places>(bits_of(base)) -
                          VecInt::broadcast(__builtin_bit_cast(int32_t, least) >> places);
  constexpr int to_sign = Format::sign == 0x80 ? 24 : 28;
  return steps + exponent +
         (shift_right<to_sign>(bits_of(ratio)) & VecInt::broadcast(Format::sign));
}

// Values of the same codes.
template <class Format>
Vec round_to_format(Vec ratio) {
  const Vec magnitude = absolute(ratio);
  const Vec base = rounding_base<Format>(magnitude);
  const Vec value = (magnitude + base) - base;
  return float_of(bits_of(value) | (bits_of(ratio) & VecInt::broadcast(INT32_MIN)));
}

// E8M0 byte of a block: of the smallest power of two that brings it into the format's range.
template <class Format, class X>
int block_scale(const X* x, int64_t width) {
  const VecInt magnitude = VecInt::broadcast(INT32_MAX);
  VecInt most = VecInt::broadcast(0);  // of bits: NaN is above infinity
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    most = max(most, bits_of(Vec::load(x + i)) & magnitude);
  }
  most = max(most, bits_of(load_first(x + i, width - i)) & magnitude);
  const int32_t bits = most.largest();
  if (bits >= 0x7f800000) {
    return kNanScale;
  }
  const auto amax = __builtin_bit_cast(float, bits);
  const float floored = amax < Format::floor ? Format::floor : amax;
  constexpr auto inverse = static_cast<float>(1.0 / Format::largest);
  return dsv4::e8m0_above(floored * inverse);
}

// Both are powers of two within the normal range: no finite block needs one of the two that are
// not, 2^-127 and 2^127.
inline Vec scale_value(int byte) {
  return Vec::broadcast(__builtin_bit_cast(float, static_cast<uint32_t>(byte) << 23));
}
inline Vec inverse_scale(int byte) {
  return Vec::broadcast(__builtin_bit_cast(float, static_cast<uint32_t>(254 - byte) << 23));
}

// One code a byte, and the scale of the block.
template <class Format, class X>
uint8_t quantise_block(const X* x, int64_t width, uint8_t* codes) {
  const int byte = block_scale<Format>(x, width);
  if (byte == kNanScale) {
    __builtin_memset(codes, Format::not_finite, static_cast<size_t>(width));
    return kNanScale;
  }
  const Vec inverse = inverse_scale(byte);
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    encode<Format>(Vec::load(x + i) * inverse).store(codes + i);
  }
  const int64_t rest = width - i;
  store_first(encode<Format>(load_first(x + i, rest) * inverse), codes + i, rest);
  return static_cast<uint8_t>(byte);
}
