// Values as a narrower type keeps them, without leaving the registers.
// Included by rows headers inside a namespace after a `Vec`, so it includes nothing and has no
// guard.

inline Vec rounded(Vec value, const float*) { return value; }

// To nearest even; every NaN stays one.
inline Vec rounded(Vec value, const dsv4::BFloat16*) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
  typedef float Floats __attribute__((vector_size(sizeof(Vec))));
  const Bits bits = __builtin_bit_cast(Bits, value);
  const Floats floats = __builtin_bit_cast(Floats, value);
  const Bits near = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return __builtin_bit_cast(Vec, near | __builtin_bit_cast(Bits, floats != floats));
}

inline Vec rounded(Vec value, const dsv4::Half*) {
  dsv4::Half element[Vec::lanes];
  value.store(element);
  return Vec::load(element);
}
