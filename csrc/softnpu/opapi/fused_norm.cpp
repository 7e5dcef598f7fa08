// Normalisation, activation and rotation operators. Tables: argument, required, dtypes, smallest and largest rank,
// source.
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>

#include "check.h"

namespace softnpu {
namespace {

const std::vector<at::ScalarType> kFloats = {kF16, kBF16, kF32};
constexpr Source kDocument = Source::kDocument, kReading = Source::kReading;

std::vector<int64_t> last_axes(In gamma) {
  std::vector<int64_t> axes;
  for (int64_t axis = -gamma.dim(); axis < 0; ++axis) axes.push_back(axis);
  return axes;
}

void normalise(In x, In gamma, double eps, Out y, Out rstd) {
  const at::Tensor wide = x.to(kF32);
  const at::Tensor r = at::rsqrt(at::mean(wide.square(), last_axes(gamma), true).add(eps));
  y = wide.mul(r).mul(gamma.to(kF32));
  if (rstd && rstd->numel()) rstd = r;
}

void check_gamma(In x, In gamma) {
  const bool fits =
      gamma.dim() <= x.dim() && x.sizes().slice(static_cast<size_t>(x.dim() - gamma.dim())) == gamma.sizes();
  require(fits, "gamma", show(gamma), "the shape of the last dimensions of x");
  require(gamma.scalar_type() == x.scalar_type(), "gamma", show(gamma), "the dtype of x");
}

// torch_npu documentation of npu_rms_norm. Ranks of gamma start at 1 in its own example.
constexpr auto check_rms_norm = [](In x, In gamma, double, Out, Out) {
  check_table({{"x", true, kFloats, 2, 8, kDocument}, {"gamma", true, kFloats, 1, 8, kReading}}, {x, gamma});
  check_gamma(x, gamma);
};

// npu_add_rms_norm: ranks 1-8, no empty tensor, gamma in x1's dtype.
constexpr auto check_add_rms_norm = [](In a, In b, In gamma, double, Out, Out, Out) {
  check_table({{"x1", true, kFloats, 1, 8, kDocument},
               {"x2", true, kFloats, 1, 8, kDocument},
               {"gamma", true, kFloats, 1, 8, kDocument}},
              {a, b, gamma});
  require(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), "x2", show(b), "shape and dtype of x1");
  require(a.numel() > 0, "x1", show(a), "no empty tensor");
  check_gamma(a, gamma);
};

// npu_swiglu: ranks 1-8; the split dimension is even (our reading).
constexpr auto check_swiglu = [](In x, int64_t dim, Out) {
  check_table({{"x", true, kFloats, 1, 8, kDocument}}, {x});
  require(dim >= -x.dim() && dim < x.dim() && x.size(dim) % 2 == 0, "dim", std::to_string(dim) + " of " + show(x),
          "an even dimension");
};

// npu_clipped_swiglu: A2 and A3 only, contiguous, more than one dimension, dim even, group_index int64 and 1-D.
constexpr auto check_clipped_swiglu = [](In x, In groups, int64_t dim, double, double, double, bool, Out) {
  require_generation(kOnA2 | kOnA3);
  check_table({{"x", true, kFloats, 2, 8, kDocument}, {"group_index", false, {at::kLong}, 1, 1, kDocument}},
              {x, groups});
  require(x.is_contiguous(), "x", show(x), "a contiguous tensor");
  require(dim >= -x.dim() && dim < x.dim() && x.size(dim) % 2 == 0, "dim", std::to_string(dim) + " of " + show(x),
          "an even dimension");
};

// npu_rotary_mul: 4-D, D even and below 896; half: r is 11SD, B1SD or BNSD (any layout), interleave: 11SD only.
constexpr auto check_rotary = [](In x, In r1, In r2, int64_t mode, Out) {
  check_table({{"x", true, kFloats, 4, 4, kDocument},
               {"cos", true, kFloats, 4, 4, kDocument},
               {"sin", true, kFloats, 4, 4, kDocument}},
              {x, r1, r2});
  require(mode == 0 || mode == 1, "mode", std::to_string(mode), "0 (half) or 1 (interleave)");
  require(x.size(3) < 896 && x.size(3) % 2 == 0, "x", show(x), "an even last dimension below 896");
  require(r1.sizes() == r2.sizes(), "sin", show(r2), "the shape of cos");
  require(r1.size(3) == x.size(3), "cos", show(r1), "the last dimension of x");
  for (int64_t axis = 0; axis < 3; ++axis)
    require(r1.size(axis) == x.size(axis) || r1.size(axis) == 1, "cos", show(r1), "sizes of x, or 1");
  require(r1.scalar_type() == x.scalar_type() && r2.scalar_type() == x.scalar_type(), "cos", show(r1),
          "the dtype of x");  // our reading
};

// npu_interleave_rope: 4-D BNSD, fp16 or bf16, contiguous; D = 64 is our reading of the kernel's description.
constexpr auto check_interleave = [](In x, In cos, In sin, Out) {
  const std::vector<at::ScalarType> halves = {kF16, kBF16};
  check_table({{"x", true, halves, 4, 4, kDocument},
               {"cos", true, halves, 4, 4, kDocument},
               {"sin", true, halves, 4, 4, kDocument}},
              {x, cos, sin});
  require(x.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(), "x", show(x), "contiguous tensors");
  require(x.size(3) == 64, "x", show(x), "a last dimension of 64");
  require(cos.sizes() == sin.sizes() && cos.size(3) == 64 && (cos.size(2) == 1 || cos.size(2) == x.size(2)), "cos",
          show(cos), "[B, N, S or 1, 64]");
  require(cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type(), "cos", show(cos),
          "the dtype of x");
};

at::Tensor half_turned(In x) {
  const auto parts = x.chunk(2, -1);
  return at::cat({at::neg(parts[1]), parts[0]}, -1);
}

at::Tensor neighbours_turned(In x) {
  const at::Tensor pairs = x.unflatten(-1, {-1, 2});
  return at::stack({at::neg(pairs.select(-1, 1)), pairs.select(-1, 0)}, -1).flatten(-2);
}

}  // namespace

CHECKED(aclnnRmsNorm, check_rms_norm,
        [](In x, In gamma, double eps, Out y, Out rstd) { normalise(x, gamma, eps, y, rstd); })
CHECKED(aclnnAddRmsNorm, check_add_rms_norm, [](In a, In b, In gamma, double eps, Out y, Out rstd, Out sum) {
  const at::Tensor x =
      at::add(a.to(kF32), b.to(kF32)).to(a.scalar_type());  // rounded before it is normalised: our reading
  sum = x;
  normalise(x, gamma, eps, y, rstd);
})
OP(aclnnRmsNormGrad, [](In g, In x, In rstd, In gamma, Out dx, Out dgamma) {
  const at::Tensor normed = x.to(kF32).mul(rstd), scaled = g.to(kF32).mul(gamma.to(kF32));
  dx = rstd.mul(scaled.sub(normed.mul(at::mean(scaled.mul(normed), last_axes(gamma), true))));
  dgamma = g.to(kF32).mul(normed).reshape({-1, gamma.numel()}).sum(0).view(gamma.sizes());
})
CHECKED(aclnnSwiGlu, check_swiglu, [](In x, int64_t dim, Out o) {
  const auto parts = x.to(kF32).chunk(2, dim);
  o = at::silu(parts[0]).mul(parts[1]);
})
OP(aclnnSwiGluGrad, [](In g, In x, int64_t dim, Out dx) {
  const auto parts = x.to(kF32).chunk(2, dim);
  const at::Tensor wide = g.to(kF32);
  dx = at::cat({at::silu_backward(wide.mul(parts[1]), parts[0]), wide.mul(at::silu(parts[0]))}, dim);
})
CHECKED(aclnnClippedSwiglu, check_clipped_swiglu,
        [](In x, In groups, int64_t dim, double alpha, double limit, double bias, bool interleaved, Out o) {
          const int64_t axis = dim < 0 ? dim + x.dim() : dim;
          const at::Tensor flat =
              x.reshape({c10::multiply_integers(x.sizes().slice(0, static_cast<size_t>(axis))), -1}).to(kF32);
          const int64_t half = flat.size(1) / 2,
                        rows = groups.defined() ? at::sum(groups).item<int64_t>() : flat.size(0);
          const at::Tensor gate =
              (interleaved ? flat.slice(1, 0, std::nullopt, 2) : flat.slice(1, 0, half)).clamp_max(limit);
          const at::Tensor up =
              (interleaved ? flat.slice(1, 1, std::nullopt, 2) : flat.slice(1, half)).clamp(-limit, limit);
          const at::Tensor y = gate.mul(at::sigmoid(gate.mul(alpha))).mul(up.add(bias));
          o.touch();
          o->view({flat.size(0), half})
              .slice(0, 0, rows)
              .copy_(y.slice(0, 0, rows));  // the rows of no group are not written
        })
CHECKED(aclnnRotaryPositionEmbedding, check_rotary, [](In x, In cos, In sin, int64_t mode, Out o) {
  const at::Tensor wide = x.to(kF32);
  o = wide.mul(cos).add((mode == 0 ? half_turned(wide) : neighbours_turned(wide)).mul(sin));
})
CHECKED(aclnnInterleaveRope, check_interleave, [](In x, In cos, In sin, Out o) {
  const at::Tensor q = x.to(kF32).unflatten(-1, {-1, 2}).transpose(-1, -2).flatten(-2);
  o = q.mul(cos).add(half_turned(q).mul(sin));
})

}  // namespace softnpu
