// Normalisation and activation operators. Tables: argument, its tensor, required, dtypes, smallest
// and largest rank, source.
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sum.h>

#include "check.h"

namespace softnpu {
namespace {

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
  const bool fits = gamma.dim() <= x.dim() &&
                    x.sizes().slice(static_cast<size_t>(x.dim() - gamma.dim())) == gamma.sizes();
  require(fits, "gamma", show(gamma), "the shape of the last dimensions of x");
}

// hicann/ops-nn norm/rms_norm/docs/aclnnRmsNorm.md
struct RmsNorm {
  at::Tensor x, gamma;
  double epsilon;
  Out y, rstd;
  FIELDS(all, x, gamma, epsilon, y, rstd)

  void check() const {
    check_table({{"x", x, true, kFloats, 1, 8, kDocument},
                 {"gamma", gamma, true, kFloats, 1, 8, kDocument},
                 {"yOut", *y, true, kFloats, 1, 8, kDocument},
                 {"rstdOut", *rstd, true, {kF32}, 1, 8, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [&] {
      check_gamma(x, gamma);
      require(gamma.numel() > 0, "gamma", show(gamma), "no empty tensor");
    });
    require(gamma.scalar_type() == x.scalar_type() || gamma.scalar_type() == kF32, "gamma",
            show(gamma), "the dtype of x, or fp32");
  }

  void run() const { normalise(x, gamma, epsilon, y, rstd); }
};

// hicann/ops-nn norm/add_rms_norm/docs/aclnnAddRmsNorm.md. Its forms without rstdOut (gamma [1, D])
// are not emulated: torch_npu gives all three outputs.
struct AddRmsNorm {
  at::Tensor x1, x2, gamma;
  double epsilon;
  Out y, rstd, sum;
  FIELDS(all, x1, x2, gamma, epsilon, y, rstd, sum)

  void check() const {
    check_table({{"x1", x1, true, kFloats, 1, 8, kDocument},
                 {"x2", x2, true, kFloats, 1, 8, kDocument},
                 {"gamma", gamma, true, kFloats, 1, 8, kDocument},
                 {"yOut", *y, true, kFloats, 1, 8, kDocument},
                 {"rstdOut", *rstd, true, {kF32}, 1, 8, kDocument},
                 {"xOut", *sum, true, kFloats, 1, 8, kDocument}});
    require(x1.sizes() == x2.sizes() && x1.scalar_type() == x2.scalar_type(), "x2", show(x2),
            "shape and dtype of x1");
    require(cann_from(9, 0) || x1.numel() > 0, "x1", show(x1),
            "no empty tensor (before CANN 9.0.0)");
    require(epsilon >= 0, "epsilon", std::to_string(epsilon), "no negative number");
    check_gamma(x1, gamma);
    require(gamma.scalar_type() == x1.scalar_type(), "gamma", show(gamma), "the dtype of x1");
  }

  void run() const {
    // Rounded before it is normalised: our reading.
    const at::Tensor x = at::add(x1.to(kF32), x2.to(kF32)).to(x1.scalar_type());
    sum = x;
    normalise(x, gamma, epsilon, y, rstd);
  }
};

void check_halves(In x, int64_t dim) {
  require(x.is_contiguous(), "x", show(x) + " with gaps", "a contiguous tensor");
  require(dim >= -x.dim() && dim < x.dim() && x.size(dim) % 2 == 0, "dim",
          std::to_string(dim) + " of " + show(x), "an even dimension");
}

// hicann/ops-nn activation/swi_glu/docs/aclnnSwiGlu.md; the largest rank is torch_npu's
// documentation.
struct SwiGlu {
  at::Tensor x;
  int64_t dim;
  Out out;
  FIELDS(all, x, dim, out)

  void check() const {
    check_table({{"x", x, true, kFloats, 1, 8, kDocument}});
    check_halves(x, dim);
  }

  void run() const {
    const auto parts = x.to(kF32).chunk(2, dim);
    out = at::silu(parts[0]).mul(parts[1]);
  }
};

// hicann/ops-nn activation/clipped_swiglu/docs/aclnnClippedSwiglu.md; contiguous by torch_npu's
// documentation.
struct ClippedSwiGlu {
  at::Tensor x, group_index;
  int64_t dim;
  double alpha, limit, bias;
  bool interleaved;
  Out out;
  FIELDS(all, x, group_index, dim, alpha, limit, bias, interleaved, out)

  void check() const {
    if (!cann_from(9, 1))
      require_generation(kOnA2 | kOnA3);  // the pages list Ascend 950 from 9.1.0
    check_table({{"x", x, true, kFloats, 1, 8, kDocument},
                 {"group_index", group_index, false, {at::kLong}, 1, 1, kDocument}});
    check_halves(x, dim);
    require(limit > 0, "limit", std::to_string(limit), "a positive number");
    if (!group_index.defined()) return;
    require(group_index.numel() <= 8192, "group_index", show(group_index), "at most 8192 groups");
    require(!on_a5() || group_index.numel() > 0, "group_index", show(group_index),
            "no empty tensor on this chip");
  }

  void run() const {
    const int64_t axis = dim < 0 ? dim + x.dim() : dim;
    const auto cut = static_cast<size_t>(axis);
    const at::Tensor flat = x.reshape({c10::multiply_integers(x.sizes().slice(0, cut)),
                                       c10::multiply_integers(x.sizes().slice(cut))})
                                .to(kF32);
    if (group_index.defined()) {  // more rows than there are: refused, our reading
      expect_values(group_index, 0, flat.size(0) + 1, "group_index");
      expect_values(at::sum(group_index), 0, flat.size(0) + 1, "group_index");
    }
    const int64_t half = flat.size(1) / 2, rows = group_index.defined()
                                                      ? at::sum(group_index).item<int64_t>()
                                                      : flat.size(0);
    const at::Tensor gate =
        (interleaved ? flat.slice(1, 0, std::nullopt, 2) : flat.slice(1, 0, half)).clamp_max(limit);
    const at::Tensor up = (interleaved ? flat.slice(1, 1, std::nullopt, 2) : flat.slice(1, half))
                              .clamp(-limit, limit);
    const at::Tensor y = gate.mul(at::sigmoid(gate.mul(alpha))).mul(up.add(bias));
    out.touch();
    out->view({flat.size(0), half})
        .slice(0, 0, rows)
        .copy_(y.slice(0, 0, rows));  // the rows of no group are not written
  }
};

}  // namespace

NAMED(aclnnRmsNorm, RmsNorm, all, check, run)
NAMED(aclnnAddRmsNorm, AddRmsNorm, all, check, run)
NAMED(aclnnSwiGlu, SwiGlu, all, check, run)
NAMED(aclnnClippedSwiglu, ClippedSwiGlu, all, check, run)
OP(aclnnRmsNormGrad, [](In g, In x, In rstd, In gamma, Out dx, Out dgamma) {
  const at::Tensor normed = x.to(kF32).mul(rstd), scaled = g.to(kF32).mul(gamma.to(kF32));
  dx = rstd.mul(scaled.sub(normed.mul(at::mean(scaled.mul(normed), last_axes(gamma), true))));
  dgamma = g.to(kF32).mul(normed).reshape({-1, gamma.numel()}).sum(0).view(gamma.sizes());
})
OP(aclnnSwiGluGrad, [](In g, In x, int64_t dim, Out dx) {
  const auto parts = x.to(kF32).chunk(2, dim);
  const at::Tensor wide = g.to(kF32);
  dx =
      at::cat({at::silu_backward(wide.mul(parts[1]), parts[0]), wide.mul(at::silu(parts[0]))}, dim);
})

}  // namespace softnpu
