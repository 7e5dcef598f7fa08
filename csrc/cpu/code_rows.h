// Rows of int8 and e4m3 codes as fp32.
// Included by rows headers inside a namespace after a `Vec`, so it includes nothing and has no
// guard.

struct Int8Code {
  int8_t code;
};

struct E4m3Code {
  uint8_t code;
};

// Whether rows of a type are codes with scales, and what the selection sees of their scores.
template <class X>
struct CodeType {
  static constexpr bool value = false;
};

template <>
struct CodeType<Int8Code> {
  static constexpr bool value = true;
  static float selectable(float score) { return score; }
};

template <>
struct CodeType<E4m3Code> {
  static constexpr bool value = true;
  static float selectable(float score) {
    return dsv4::to_float(dsv4::from_float<dsv4::BFloat16>(score));
  }
};

typedef int8_t CodeBytes __attribute__((vector_size(Vec::lanes)));
typedef int32_t CodeWords __attribute__((vector_size(sizeof(Vec))));
typedef float CodeFloats __attribute__((vector_size(sizeof(Vec))));

inline Vec load_codes(const Int8Code* from) {
  CodeBytes bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return __builtin_bit_cast(Vec, __builtin_convertvector(bytes, CodeFloats));
}

inline Vec load_codes(const E4m3Code* from) {
  CodeBytes bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  const CodeWords code = __builtin_convertvector(bytes, CodeWords);
  const CodeWords magnitude = (code & 0x7f) << 20;
  const CodeWords normal = magnitude + (120 << 23);  // the bias of fp32 instead of 7
  // Below 2^-6: counts of 2^-9, which a subtraction makes of the mantissa.
  const CodeFloats above = __builtin_bit_cast(CodeFloats, magnitude | (121 << 23)) - 0x1p-6f;
  const CodeWords small = magnitude < (1 << 23);
  const CodeWords nan = magnitude == (0x7f << 20);
  const CodeWords value = (__builtin_bit_cast(CodeWords, above) & small) | (normal & ~small);
  return __builtin_bit_cast(Vec, value | (nan & 0x7fc00000) | (code & INT32_MIN));
}

// A row as fp32, and zeros up to `padded` elements, a multiple of a vector.
template <class Code>
void widen_codes(const Code* from, int64_t channels, float* to, int64_t padded) {
  int64_t c = 0;
  for (; c + Vec::lanes <= channels; c += Vec::lanes) load_codes(from + c).store(to + c);
  if (c < channels) {
    Code last[Vec::lanes] = {};
    __builtin_memcpy(last, from + c, static_cast<size_t>(channels - c));
    load_codes(last).store(to + c);
    c += Vec::lanes;
  }
  for (; c < padded; c += Vec::lanes) Vec::broadcast(0.0f).store(to + c);
}

inline void widen_row(const Int8Code* from, int64_t channels, float* to, int64_t padded) {
  widen_codes(from, channels, to, padded);
}

inline void widen_row(const E4m3Code* from, int64_t channels, float* to, int64_t padded) {
  widen_codes(from, channels, to, padded);
}
