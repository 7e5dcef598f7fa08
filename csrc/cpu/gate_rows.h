// Tokens of expert routing, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

// Logits of `tokens` tokens, [tokens, experts].
template <int tokens, class W>
void gate_logits(const dsv4::cpu::Gate& call, const float* x, float* logits) {
  const int64_t width = call.x_rows.width();
  const auto* weight = static_cast<const W*>(call.weight);
  constexpr int step = 8 / tokens;
  for (int64_t first = 0; first < call.experts; first += step) {
    const int64_t rows = call.experts - first < step ? call.experts - first : step;
    Vec sums[step * tokens];
    for (Vec& sum : sums) {
      sum = Vec::broadcast(0);
    }
    add_all_products<tokens>(x, width, weight + first * call.weight_stride, call.weight_stride,
                             rows, width, sums);
    for (int64_t k = 0; k < rows * tokens; ++k) {
      logits[k % tokens * call.experts + first + k / tokens] = sums[k].sum();
    }
  }
}

template <class X>
struct TokensOf {
  template <class W>
  static void gate(const dsv4::cpu::Gate& call, int64_t begin, int64_t end) {
    constexpr int tile = 4;  // tokens that share what is read of the weight
    const int64_t width = call.x_rows.width();
    const auto floats = static_cast<size_t>(tile * (width + call.experts));
    auto* x = static_cast<float*>(dsv4::cpu::scratch(floats * sizeof(float)));
    float* logits = x + tile * width;
    for (int64_t token = begin; token < end;) {
      const int count = end - token < tile ? 1 : tile;
      for (int t = 0; t < count; ++t) {
        widen_row(static_cast<const X*>(call.x) + call.x_rows.offset(token + t), width,
                  x + t * width);
      }
      if (count == tile) {
        gate_logits<tile, W>(call, x, logits);
      } else {
        gate_logits<1, W>(call, x, logits);
      }
      for (int t = 0; t < count; ++t) {
        dsv4::cpu::route(call, token + t, logits + t * call.experts);
      }
      token += count;
    }
  }
};

template <class X>
void gate_of(const dsv4::cpu::Gate& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.weight_dtype, TokensOf<X>::template gate, call, begin, end);
}

void gate_rows(const dsv4::cpu::Gate& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, gate_of, call, begin, end);
}
