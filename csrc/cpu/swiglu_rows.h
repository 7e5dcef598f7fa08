// Rows of the clamped SwiGLU, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

template <class X>
void multiply_gate(const X* gate, const X* up, float weight, float limit, int64_t width, X* y) {
  const Vec most = Vec::broadcast(limit);
  const Vec least = Vec::broadcast(-limit);
  const Vec factor = Vec::broadcast(weight);
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    const Vec g = min(load_first(gate + i, width - i), most);
    const Vec u = min(max(load_first(up + i, width - i), least), most);
    const Vec silu = g / (Vec::broadcast(1) + exp(Vec::broadcast(0) - g));
    store_first(silu * u * factor, y + i, width - i);
  }
}

inline float weight_of(const dsv4::cpu::Swiglu& call, int64_t row) {
  return call.weights == nullptr ? 1.0f : call.weights[row * call.weights_stride];
}

template <class X>
void swiglu_typed(const dsv4::cpu::Swiglu& call, int64_t begin, int64_t end) {
  const int64_t width = call.gate_rows.width();
  for (int64_t row = begin; row < end; ++row) {
    multiply_gate(static_cast<const X*>(call.gate) + call.gate_rows.offset(row),
                  static_cast<const X*>(call.up) + call.up_rows.offset(row), weight_of(call, row),
                  call.limit, width, static_cast<X*>(call.y) + row * width);
  }
}

void swiglu_rows(const dsv4::cpu::Swiglu& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, swiglu_typed, call, begin, end);
}

void swiglu_quant_rows(const dsv4::cpu::SwigluQuant& call, int64_t begin, int64_t end) {
  using dsv4::cpu::kSwigluBlock;
  const dsv4::cpu::Swiglu& product = call.product;
  const int64_t width = product.gate_rows.width();
  uint8_t* scale = call.scales + begin * ((width + kSwigluBlock - 1) / kSwigluBlock);
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate =
        static_cast<const dsv4::BFloat16*>(product.gate) + product.gate_rows.offset(row);
    const auto* up = static_cast<const dsv4::BFloat16*>(product.up) + product.up_rows.offset(row);
    const float weight = weight_of(product, row);
    for (int64_t i = 0; i < width; i += kSwigluBlock) {
      const int64_t count = width - i < kSwigluBlock ? width - i : kSwigluBlock;
      dsv4::BFloat16 block[kSwigluBlock];
      multiply_gate(gate + i, up + i, weight, product.limit, count, block);
      *scale++ = quantise_block<E4m3>(block, count, call.codes + row * width + i);
    }
  }
}
