// Eight fp32 lanes with AVX2, FMA and F16C.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

struct Vec {
  static constexpr int lanes = 8;
  __m256 value;
  using Bits = __m128i;  // 16 of each lane

  static Vec of_half(Bits bits) { return {_mm256_cvtph_ps(bits)}; }
  static Vec of_bfloat16(Bits bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const dsv4::Half* from) { return of_half(load_half(from)); }
  static Vec load(const dsv4::BFloat16* from) { return of_bfloat16(load_half(from)); }
  static Vec load(const int32_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }

  void store(float* to) const { _mm256_storeu_ps(to, value); }
  void store(dsv4::Half* to) const {
    store_half(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(dsv4::BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    store_half(to,
               _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }

  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  static __m128i load_half(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static void store_half(void* to, __m128i bits) {
    _mm_storeu_si128(static_cast<__m128i*>(to), bits);
  }
};

inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.value, b.value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.value, b.value)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.value, b.value, c.value)};
}
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.value, b.value)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.value, b.value)}; }
inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.value)}; }
// `a` if it is a NaN, as torch's clamp keeps it.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(b.value, a.value)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(b.value, a.value)}; }
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.value)}; }
inline Vec round_even(Vec a) {
  return {_mm256_round_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// a * 2^n of whole numbers n in [-150, 128]; a result below the normal range may be flushed to 0.
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.value);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256 once = _mm256_mul_ps(a.value, power_of_two(half));
  return {_mm256_mul_ps(once, power_of_two(_mm256_sub_epi32(whole, half)))};
}

// a * b + c, rounded once.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

struct VecInt {
  __m256i value;

  static VecInt broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static VecInt load(const int32_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
  void store(int32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }

  // Lanes of 0 to 255.
  void store(uint8_t* to) const {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }

  int32_t largest() const {
    const __m128i four =
        _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

  int32_t sum() const {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
};

inline VecInt bits_of(Vec a) { return {_mm256_castps_si256(a.value)}; }
inline Vec float_of(VecInt a) { return {_mm256_castsi256_ps(a.value)}; }
inline VecInt operator+(VecInt a, VecInt b) { return {_mm256_add_epi32(a.value, b.value)}; }
inline VecInt operator-(VecInt a, VecInt b) { return {_mm256_sub_epi32(a.value, b.value)}; }
inline VecInt operator&(VecInt a, VecInt b) { return {_mm256_and_si256(a.value, b.value)}; }
inline VecInt operator|(VecInt a, VecInt b) { return {_mm256_or_si256(a.value, b.value)}; }
inline VecInt max(VecInt a, VecInt b) { return {_mm256_max_epi32(a.value, b.value)}; }
template <int places>
VecInt shift_right(VecInt a) {
  return {_mm256_srli_epi32(a.value, places)};
}

struct VecShort {
  static constexpr int lanes = 16;
  __m256i value;

  static VecShort load(const int8_t* from) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static VecShort load(const int16_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
  static VecShort broadcast_pair(const int16_t* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return {_mm256_set1_epi32(pair)};
  }
  void store(int16_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
};

// sum + products of lanes, each pair of neighbours added.
inline VecInt add_pairs(VecInt sum, VecShort a, VecShort b) {
  return sum + VecInt{_mm256_madd_epi16(a.value, b.value)};
}

// Lane i of the result is lane i ^ distance: 1, 2 or 4.
template <int distance>
Vec exchange(Vec a) {
  if constexpr (distance == 4) {
    return {_mm256_permute2f128_ps(a.value, a.value, 1)};
  } else {
    return {_mm256_permute_ps(a.value, distance == 1 ? 0xb1 : 0x4e)};
  }
}

// Vectors of bytes, and tables that they look up in by codes from 0 to 15.
constexpr int kCodeLanes = 2;  // of 16 bytes
using CodeVector = __m256i;
using CodeTable = __m128i;

inline CodeVector look_up(CodeTable table, CodeVector codes) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
