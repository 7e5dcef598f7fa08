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
