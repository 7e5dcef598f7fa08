#include "rope.h"

#include <cmath>

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/rope_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
void apply_rope(const ApplyRope& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), call.width, DSV4_FOR_ISA(isa, rotate_rows));
}

void rope(const Rope& call, Isa isa) {
  if (call.x_rows.count() == 0) {
    return;
  }
  const int64_t width = 2 * call.pairs;
  const auto half = static_cast<size_t>(call.tokens * width);
  auto* cos = static_cast<float*>(scratch(2 * half * sizeof(float)));
  float* sin = cos + half;
  for (int64_t token = 0; token < call.tokens; ++token) {
    // fp32, as the model was trained with it.
    const auto at = static_cast<float>(call.positions.at(token * call.position_stride));
    for (int64_t pair = 0; pair < call.pairs; ++pair) {
      const float angle = at * call.inv_freq[pair * call.inv_freq_stride];
      const int64_t first = token * width + 2 * pair;
      cos[first] = cos[first + 1] = std::cos(angle);
      sin[first] = sin[first + 1] = std::sin(call.inverse ? -angle : angle);
    }
  }
  parallel_rows(call, call.x_rows.count(), call.x_rows.width(), DSV4_FOR_ISA(isa, copy_rows));
  const int64_t channels = call.x_rows.width();
  const int64_t sizes[] = {call.x_rows.count(), channels};
  const int64_t strides[] = {channels, 1};
  apply_rope({call.dtype, call.y, {sizes, strides}, call.tokens, width, cos, width, sin, width},
             isa);
}

}  // namespace dsv4::cpu
