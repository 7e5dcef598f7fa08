#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/floor.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/round.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <array>
#include <limits>

#include "fused_quant.h"

namespace softnpu {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int64_t largest_exponent(at::ScalarType type) { return type == kE4M3 ? 8 : type == kE5M2 ? 15 : 2; }

// Shared exponent from the peak of each block by dividing it by the type's maximum and rounding the
// scale up.
at::Tensor exponents_by_division(In peak, double maximum, bool round_subnormals) {
  const at::Tensor bits =
      peak.to(kF32).div(static_cast<float>(maximum)).view(at::kInt).to(at::kLong);
  const at::Tensor exponent = bits.bitwise_right_shift(23),
                   mantissa = at::bitwise_and(bits, 0x7fffff);
  at::Tensor up = exponent.gt(0).logical_and(exponent.lt(254)).logical_and(mantissa.gt(0));
  if (round_subnormals) up = up.logical_or(exponent.eq(0).logical_and(mantissa.gt(0x400000)));
  return exponent.add(up.to(at::kLong)).sub(127).to(at::kDouble);
}

}  // namespace

at::Tensor shared_exponents(In largest_of_block, at::ScalarType type, const MxOptions& options) {
  const at::Tensor peak = largest_of_block.clamp_min(options.low_bound);
  at::Tensor exponent;
  if (options.algorithm == 1) {
    exponent = exponents_by_division(peak, largest(type), true);
  } else if (options.algorithm == 2 && options.dst_max != 0 && options.dst_max != 6 &&
             options.dst_max != 7) {
    exponent = exponents_by_division(peak, options.dst_max, false);
  } else {
    const auto [fraction, power] = at::frexp(peak);  // fraction in [0.5, 1)
    exponent = power.to(at::kDouble).sub(1 + largest_exponent(type));
    // Algorithm 2 rounds up above 1.5 (maximum 0 or 6) or 1.75 (7): our reading of "the high
    // mantissa bits are 1".
    if (options.algorithm == 2)
      exponent = exponent.add(fraction.gt(options.dst_max == 7 ? 0.875 : 0.75));
  }
  exponent = at::where(peak.eq(0), -127.0, exponent.clamp_min(-127));
  return at::where(at::isfinite(peak), exponent, kNan);
}

at::Tensor exponent_bytes(In exponents) { return exponents.add(127).nan_to_num(255).to(at::kByte); }

Types also_on_a5(Types everywhere, const Types& a5) {
  if (on_a5()) everywhere.insert(everywhere.end(), a5.begin(), a5.end());
  return everywhere;
}

double largest(at::ScalarType type) {
  switch (type) {
    case at::kChar:
      return 127;
    case at::kInt:
    case kI4:
      return 7;
    case kE4M3:
      return 448;
    case kE5M2:
      return 57344;
    default:
      return 6;  // kE2M1
  }
}

at::Tensor saturated(In values, at::ScalarType type) {
  const double limit = largest(type);
  return at::where(at::isnan(values), kNan, values.clamp(-limit, limit))
      .to(kF32)
      .to(type);  // one NaN, without sign
}

void store_bytes(Out o, In bytes) {
  o.touch();
  o->view(at::kByte).copy_(bytes);
}

at::Tensor pack(In nibbles) {
  const at::Tensor pairs = at::bitwise_and(nibbles.to(at::kInt), 15).unflatten(-1, {-1, 2});
  return pairs.select(-1, 0).add(pairs.select(-1, 1), 16).to(at::kByte);
}

at::Tensor unpack(In bytes) {
  const at::Tensor wide = bytes.to(at::kInt);
  return at::stack({at::bitwise_and(wide, 15), wide.bitwise_right_shift(4)}, -1).flatten(-2);
}

namespace {

// 4-bit values lie along the dimension without gaps: the last, or the one before it of a transposed
// matrix.
template <class Decode>
at::Tensor along_packed(In x, Decode decode) {
  return x.stride(-1) == 1 ? decode(x.contiguous())
                           : decode(x.transpose(-1, -2).contiguous()).transpose(-1, -2);
}

// What the two codes of each byte stand for: [256, 2], the low nibble's first.
at::Tensor of_all_bytes(const std::array<double, 16>& values) {
  const at::Tensor codes = at::tensor(at::ArrayRef<double>(values), at::kDouble);
  return codes.index_select(0, unpack(at::arange(256, at::kInt)).view(-1)).view({256, 2});
}

at::Tensor looked_up(In pairs, In packed) {
  const at::Tensor bytes = packed.view(at::kByte);
  return pairs.index_select(0, bytes.flatten().to(at::kInt))
      .unflatten(0, bytes.sizes())
      .flatten(-2);
}

}  // namespace

at::Tensor int4_values(In x) {
  static const at::Tensor pairs =
      of_all_bytes({0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1});
  return along_packed(x, [](In packed) { return looked_up(pairs, packed); });
}

at::Tensor fp4_values(In x) {
  static const at::Tensor pairs = of_all_bytes({0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,  //
                                                -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0});
  return along_packed(x, [](In packed) { return looked_up(pairs, packed); });
}

at::Tensor fp4_bytes(In values, const std::string& round_mode) {
  const at::Tensor size = values.abs();
  const at::Tensor step = at::where(size.lt(2), 0.5, at::where(size.lt(4), 1.0, 2.0));
  const at::Tensor ratio = values.div(step);
  at::Tensor steps;
  if (round_mode == "floor")
    steps = at::floor(ratio);
  else if (round_mode == "round")
    steps = at::floor(ratio.abs().add(0.5)).mul(ratio.sign());
  else
    steps = at::round(ratio);
  const at::Tensor rounded =
      steps.mul(step).nan_to_num(0).clamp(-6, 6);  // FLOAT4 has no NaN: 0 is our reading
  const at::Tensor magnitude = rounded.abs();
  const at::Tensor code =
      at::where(magnitude.lt(2), magnitude.mul(2),
                at::where(magnitude.lt(4), magnitude.add(2), magnitude.div(2).add(4)));
  return pack(code.to(at::kInt).add(rounded.signbit().to(at::kInt), 8));
}

at::Tensor mx_values(In scaled, at::ScalarType type, const std::string& round_mode) {
  return type == kE2M1 ? fp4_bytes(scaled, round_mode) : saturated(scaled, type);
}

Mx mx_quantise(In x, at::ScalarType type, const MxOptions& options) {
  const int64_t axis = options.axis < 0 ? options.axis + x.dim() : options.axis,
                count = x.size(axis);
  const int64_t blocks =
      ceil_div(ceil_div(count, options.block), 2) * 2;  // pairs; a missing one is zero
  const at::Tensor padded =
      at::constant_pad_nd(x.to(at::kDouble).movedim(axis, -1), {0, blocks * options.block - count})
          .unflatten(-1, {blocks, options.block});
  const at::Tensor exponent = shared_exponents(at::amax(padded.abs(), {-1}), type, options);
  // NaN and infinity in a block: scale and FLOAT8 values are NaN (our reading).
  const at::Tensor scaled = padded.mul(at::exp2(exponent.neg()).unsqueeze(-1))
                                .flatten(-2)
                                .slice(-1, 0, count)
                                .movedim(-1, axis);
  const at::Tensor scale = exponent_bytes(exponent).unflatten(-1, {-1, 2});
  return {mx_values(scaled, type, options.round_mode), scale.movedim(-2, axis)};
}

}  // namespace softnpu
