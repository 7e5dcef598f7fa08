// Rows of integer sums through SwiGLU into codes, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// header of its own.

#include "cpu/token_codes.h"

// What `count` sums stand for, at most a vector.
inline Vec scaled_sums(const int32_t* sums, const float* scale, Vec of_row, int64_t count) {
  return load_first(sums, count) * load_first(scale, count) * of_row;
}

void int8_swiglu_rows(const dsv4::cpu::Int8SwigluQuant& call, int64_t expert, int64_t begin,
                      int64_t end) {
  const int64_t width = call.width;
  const float* gate_scale = call.weight_scale + expert * call.weight_scale_stride;
  const float* up_scale = gate_scale + width;
  const Vec most = Vec::broadcast(call.limit);
  const Vec least = Vec::broadcast(-call.limit);
  float* hidden = row_scratch(width);
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* gate = call.sums + row * call.sums_stride;
    const int32_t* up = gate + width;
    const Vec of_row = Vec::broadcast(call.x_scale[row * call.x_scale_stride]);
    for (int64_t i = 0; i < width; i += Vec::lanes) {
      const int64_t count = width - i;
      const Vec g = min(scaled_sums(gate + i, gate_scale + i, of_row, count), most);
      const Vec u = min(max(scaled_sums(up + i, up_scale + i, of_row, count), least), most);
      const Vec silu = g / (Vec::broadcast(1) + exp(Vec::broadcast(0) - g));
      (silu * u).store(hidden + i);
    }
    for (int64_t i = width; i < padded_width(width); ++i) hidden[i] = 0;  // also of a NaN scale
    auto* codes = reinterpret_cast<uint8_t*>(call.codes + row * width);
    call.scales[row] = quantise_token<Int8Token>(hidden, width, codes);
  }
}
