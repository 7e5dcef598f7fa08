#include "rotary.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/stack.h>

#include "check.h"

namespace softnpu {
namespace {

at::Tensor half_turned(In x) {
  const auto parts = x.chunk(2, -1);
  return at::cat({at::neg(parts[1]), parts[0]}, -1);
}

at::Tensor neighbours_turned(In x) {
  const at::Tensor pairs = x.unflatten(-1, {-1, 2});
  return at::stack({at::neg(pairs.select(-1, 1)), pairs.select(-1, 0)}, -1).flatten(-2);
}

at::Tensor even_then_odd(In x) { return x.unflatten(-1, {-1, 2}).transpose(-1, -2).flatten(-2); }
at::Tensor interleaved(In x) { return x.unflatten(-1, {2, -1}).transpose(-1, -2).flatten(-2); }

at::Tensor turned(In x, int64_t mode) {
  if (mode == rotary::kInterleave) return neighbours_turned(x);
  if (mode == rotary::kQuarter) return half_turned(x.unflatten(-1, {2, -1})).flatten(-2);
  return half_turned(x);
}

}  // namespace

at::Tensor rotated(In x, In cos, In sin, int64_t mode, In rotate) {
  const at::Tensor wide = mode == rotary::kInterleaveHalf ? even_then_odd(x.to(kF32)) : x.to(kF32);
  const at::Tensor other =
      rotate.defined() ? at::matmul(wide, rotate.to(kF32)) : turned(wide, mode);
  return wide.mul(cos).add(other.mul(sin));
}

RotaryGradients rotary_gradients(In gradient, In cos, In sin, In x, int64_t mode) {
  const at::Tensor g = gradient.to(kF32), c = cos.to(kF32), s = sin.to(kF32);
  // The turn by 90 degrees is antisymmetric: its transpose is its negative.
  const at::Tensor straight = g.mul(c).sub(turned(g.mul(s), mode));
  RotaryGradients result{
      mode == rotary::kInterleaveHalf ? interleaved(straight) : straight, {}, {}};
  if (!x.defined()) return result;
  const at::Tensor wide = mode == rotary::kInterleaveHalf ? even_then_odd(x.to(kF32)) : x.to(kF32);
  result.cos = at::sum_to(g.mul(wide), cos.sizes());
  result.sin = at::sum_to(g.mul(turned(wide, mode)), sin.sizes());
  return result;
}

}  // namespace softnpu
