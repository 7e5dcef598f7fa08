// Eight fp32 lanes in plain C++: what runs where no other vector type does (Arm hosts: the compiler
// makes NEON of it). Included by foreach_isa.h inside a namespace, so it includes nothing and has
// no guard.

struct Vec {
  static constexpr int lanes = 8;
  float lane[lanes];

  static Vec broadcast(float value) {
    Vec result;
    for (float& lane : result.lane) lane = value;
    return result;
  }

  template <class T>
  static Vec load(const T* from) {
    Vec result;
    for (int i = 0; i < lanes; ++i) result.lane[i] = dsv4::to_float(from[i]);
    return result;
  }

  template <class T>
  void store(T* to) const {
    for (int i = 0; i < lanes; ++i) to[i] = dsv4::from_float<T>(lane[i]);
  }

  float sum() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

inline Vec operator*(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}

inline Vec operator+(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] += b.lane[i];
  return a;
}

// a * b + c; whether the product is rounded is left to the compiler.
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec operator-(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}

inline Vec operator/(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] /= b.lane[i];
  return a;
}

inline Vec square_root(Vec a) {
  for (float& lane : a.lane) lane = __builtin_sqrtf(lane);
  return a;
}

// `a` if it is a NaN, as torch's clamp keeps it.
inline Vec max(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] = b.lane[i] > a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}

inline Vec min(Vec a, Vec b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}

inline Vec absolute(Vec a) {
  for (float& lane : a.lane) lane = __builtin_fabsf(lane);
  return a;
}

inline Vec round_even(Vec a) {
  for (float& lane : a.lane) lane = __builtin_rintf(lane);
  return a;
}

inline float power_of_two(int n) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(n + 127) << 23);
}

// a * 2^n of whole numbers n in [-150, 128]; a result below the normal range may be flushed to 0.
inline Vec times_power_of_two(Vec a, Vec n) {
  for (int i = 0; i < Vec::lanes; ++i) {
    const int whole = static_cast<int>(n.lane[i]);
    a.lane[i] *= power_of_two(whole / 2);
    a.lane[i] *= power_of_two(whole - whole / 2);
  }
  return a;
}

// a * b + c, rounded once.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < Vec::lanes; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}

struct VecInt {
  int32_t lane[Vec::lanes];

  static VecInt broadcast(int32_t value) {
    VecInt result;
    for (int32_t& lane : result.lane) lane = value;
    return result;
  }

  // Lanes of 0 to 255.
  void store(uint8_t* to) const {
    for (int i = 0; i < Vec::lanes; ++i) to[i] = static_cast<uint8_t>(lane[i]);
  }

  int32_t largest() const {
    int32_t result = lane[0];
    for (const int32_t value : lane) result = value > result ? value : result;
    return result;
  }
};

inline VecInt bits_of(Vec a) { return __builtin_bit_cast(VecInt, a); }
inline Vec float_of(VecInt a) { return __builtin_bit_cast(Vec, a); }

inline VecInt operator+(VecInt a, VecInt b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] += b.lane[i];
  return a;
}

inline VecInt operator-(VecInt a, VecInt b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}

inline VecInt operator&(VecInt a, VecInt b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] &= b.lane[i];
  return a;
}

inline VecInt operator|(VecInt a, VecInt b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] |= b.lane[i];
  return a;
}

inline VecInt max(VecInt a, VecInt b) {
  for (int i = 0; i < Vec::lanes; ++i) a.lane[i] = b.lane[i] > a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}

template <int places>
VecInt shift_right(VecInt a) {
  for (int32_t& lane : a.lane) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) >> places);
  return a;
}

// Lane i of the result is lane i ^ distance: 1, 2 or 4.
template <int distance>
Vec exchange(Vec a) {
  Vec result;
  for (int i = 0; i < Vec::lanes; ++i) result.lane[i] = a.lane[i ^ distance];
  return result;
}
