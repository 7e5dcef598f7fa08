// Rows of codes with one scale each, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard but the
// header of its own.

#include "cpu/token_codes.h"

// x * weight / sqrt(mean square + eps), in place.
template <class W>
void normalise(float* row, const W* weight, float eps, int64_t width) {
  Vec sums[4] = {Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0)};
  add_squares(row, width, sums);
  const float mean = sum_of_four(sums) / static_cast<float>(width);
  const Vec factor = Vec::broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    const Vec scaled = Vec::load(row + i) * factor * load_first(weight + i, width - i);
    store_first(scaled, row + i, width - i);
  }
}

template <class X>
void token_quant_typed(const dsv4::cpu::TokenQuant& call, int64_t begin, int64_t end) {
  const int64_t width = call.x_rows.width();
  float* row = row_scratch(width);
  for (int64_t r = begin; r < end; ++r) {
    widen_row(static_cast<const X*>(call.x) + call.x_rows.offset(r), width, row,
              padded_width(width));
    if (call.weight != nullptr) {
      normalise(row, static_cast<const X*>(call.weight), call.eps, width);
    }
    uint8_t* codes = call.codes + r * width;
    call.scales[r] = call.format == dsv4::cpu::TokenFormat::int8
                         ? quantise_token<Int8Token>(row, width, codes)
                         : quantise_token<E4m3Token>(row, width, codes);
  }
}

void token_quant_rows(const dsv4::cpu::TokenQuant& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, token_quant_typed, call, begin, end);
}
