// Eight fp32 lanes with AVX2, FMA and F16C.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

struct Vec {
  static constexpr int lanes = 8;
  __m256 value;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const dsv4::Half* from) { return {_mm256_cvtph_ps(load_half(from))}; }
  static Vec load(const dsv4::BFloat16* from) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16))};
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
