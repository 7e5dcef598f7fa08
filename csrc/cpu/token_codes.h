// Codes of fp32 rows under one scale each, over the vector type `Vec` of the including file.
// Included by rows headers inside a namespace, so it includes nothing and has no guard.

struct Int8Token {
  static constexpr float largest = 127.0f;
  static constexpr int not_finite = 0;  // code of every element of a row with a NaN scale

  // Of ratios within the range: the low byte of 1.5 * 2^23 plus the ratio, whose last bit counts 1.
  static VecInt codes(Vec ratio) {
    return bits_of(ratio + Vec::broadcast(0x1.8p23f)) & VecInt::broadcast(255);
  }
};

struct E4m3Token {
  static constexpr float largest = E4m3::largest;
  static constexpr int not_finite = E4m3::not_finite;

  static VecInt codes(Vec ratio) { return encode<E4m3>(ratio); }
};

inline int64_t padded_width(int64_t width) {
  return (width + Vec::lanes - 1) / Vec::lanes * Vec::lanes;
}

// This thread's row of fp32, with room for whole vectors.
inline float* row_scratch(int64_t width) {
  return static_cast<float*>(
      dsv4::cpu::scratch(static_cast<size_t>(padded_width(width)) * sizeof(float)));
}

// Codes of `width` channels; returns their scale. row: zeros behind them up to a whole vector.
template <class Format>
float quantise_token(const float* row, int64_t width, uint8_t* codes) {
  VecInt most = VecInt::broadcast(0);  // of bits: NaN is above infinity
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    most = max(most, bits_of(absolute(Vec::load(row + i))));
  }
  const int32_t bits = most.largest();
  if (bits >= 0x7f800000) {
    __builtin_memset(codes, Format::not_finite, static_cast<size_t>(width));
    return __builtin_nanf("");
  }
  const float scale = __builtin_bit_cast(float, bits) / Format::largest;
  if (scale == 0) {  // of zeros, and of what is so small that the quotient is
    __builtin_memset(codes, 0, static_cast<size_t>(width));
    return scale;
  }
  const Vec divisor = Vec::broadcast(scale);
  const Vec most_ratio = Vec::broadcast(Format::largest);
  const Vec least_ratio = Vec::broadcast(-Format::largest);
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    const Vec ratio = min(max(Vec::load(row + i) / divisor, least_ratio), most_ratio);
    store_first(Format::codes(ratio), codes + i, width - i);
  }
  return scale;
}
