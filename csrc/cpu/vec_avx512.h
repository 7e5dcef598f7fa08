// Sixteen fp32 lanes with AVX-512 (F, BW, DQ, VL, VNNI).
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

struct Vec {
  static constexpr int lanes = 16;
  __m512 value;
  using Bits = __m256i;  // 16 of each lane

  static Vec of_half(Bits bits) { return {_mm512_cvtph_ps(bits)}; }
  static Vec of_bfloat16(Bits bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const dsv4::Half* from) { return of_half(load_half(from)); }
  static Vec load(const dsv4::BFloat16* from) { return of_bfloat16(load_half(from)); }
  static Vec load(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }

  void store(float* to) const { _mm512_storeu_ps(to, value); }
  void store(dsv4::Half* to) const {
    store_half(to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(dsv4::BFloat16* to) const {  // not vcvtneps2bf16: it flushes subnormals
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    store_half(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  float sum() const { return _mm512_reduce_add_ps(value); }

 private:
  static __m256i load_half(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void store_half(void* to, __m256i bits) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), bits);
  }
};

inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.value, b.value)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.value, b.value, c.value)};
}
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.value, b.value)}; }
inline Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.value)}; }
// `a` if it is a NaN, as torch's clamp keeps it.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(b.value, a.value)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(b.value, a.value)}; }
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.value)}; }
inline Vec round_even(Vec a) {
  return {_mm512_roundscale_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n of whole numbers n in [-150, 128]; a result below the normal range may be flushed to 0.
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.value, n.value)}; }

// a * b + c, rounded once.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

struct VecInt {
  __m512i value;

  static VecInt broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static VecInt load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  void store(int32_t* to) const { _mm512_storeu_si512(to, value); }

  // Lanes of 0 to 255.
  void store(uint8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
  }

  int32_t largest() const { return _mm512_reduce_max_epi32(value); }

  int32_t sum() const { return _mm512_reduce_add_epi32(value); }
};

inline VecInt bits_of(Vec a) { return {_mm512_castps_si512(a.value)}; }
inline Vec float_of(VecInt a) { return {_mm512_castsi512_ps(a.value)}; }
inline VecInt operator+(VecInt a, VecInt b) { return {_mm512_add_epi32(a.value, b.value)}; }
inline VecInt operator-(VecInt a, VecInt b) { return {_mm512_sub_epi32(a.value, b.value)}; }
inline VecInt operator&(VecInt a, VecInt b) { return {_mm512_and_si512(a.value, b.value)}; }
inline VecInt operator|(VecInt a, VecInt b) { return {_mm512_or_si512(a.value, b.value)}; }
inline VecInt max(VecInt a, VecInt b) { return {_mm512_max_epi32(a.value, b.value)}; }
template <int places>
VecInt shift_right(VecInt a) {
  return {_mm512_srli_epi32(a.value, places)};
}

struct VecShort {
  static constexpr int lanes = 32;
  __m512i value;

  static VecShort load(const int8_t* from) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static VecShort load(const int16_t* from) { return {_mm512_loadu_si512(from)}; }
  static VecShort broadcast_pair(const int16_t* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return {_mm512_set1_epi32(pair)};
  }
  void store(int16_t* to) const { _mm512_storeu_si512(to, value); }
};

// sum + products of lanes, each pair of neighbours added.
inline VecInt add_pairs(VecInt sum, VecShort a, VecShort b) {
  return {_mm512_dpwssd_epi32(sum.value, a.value, b.value)};
}

// Lane i of the result is lane i ^ distance: 1, 2, 4 or 8.
template <int distance>
Vec exchange(Vec a) {
  if constexpr (distance == 8) {
    return {_mm512_shuffle_f32x4(a.value, a.value, 0x4e)};
  } else if constexpr (distance == 4) {
    return {_mm512_shuffle_f32x4(a.value, a.value, 0xb1)};
  } else {
    return {_mm512_permute_ps(a.value, distance == 1 ? 0xb1 : 0x4e)};
  }
}

// Vectors of bytes, and tables that they look up in by codes from 0 to 15.
constexpr int kCodeLanes = 2;  // of 16 bytes
using CodeVector = __m256i;
using CodeTable = __m128i;

inline CodeVector look_up(CodeTable table, CodeVector codes) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
