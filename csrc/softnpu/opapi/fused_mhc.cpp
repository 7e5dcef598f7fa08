// Hyper-connection operators. Tables: argument, required, dtypes, smallest and largest rank, source.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

const Types kSingle = {kF32};

bool is_streams(int64_t n) { return n == 4 || n == 6 || n == 8; }

// The oldest pages are those of CANN 9.1.0; torch_npu asks for 9.0.0, which is our reading for Ascend 950.
void require_version(int major, int minor) {
  if (!cann_from(major, minor))
    throw Fault(kNnParameter, "the operator does not exist before CANN " + std::to_string(major) + "." +
                                  std::to_string(minor) + ".0 on " + config().soc);
}

// mirror-cann/ops-transformer mhc/mhc_sinkhorn/docs/aclnnMhcSinkhorn.md
constexpr auto check_sinkhorn = [](In x, float, int64_t iterations, Out o, Out norm, Out sum) {
  require_generation(kOnA5);
  require_version(9, 0);
  check_table({{"x", true, kSingle, 3, 4, kDocument}, {"output", true, kSingle, 3, 4, kDocument}}, {x, *o});
  require(is_streams(x.size(-1)) && x.size(-2) == x.size(-1), "x", show(x), "[..., n, n] with n 4, 6 or 8");
  require(x.numel() > 0, "x", show(x), "no empty tensor");
  require(iterations >= 1 && iterations <= 100, "num_iters", std::to_string(iterations), "1 to 100");
  // Their sizes are documented, the order of their values is not (it depends on how the kernel splits the work).
  require((!norm || norm->numel() == 0) && (!sum || sum->numel() == 0), "out_flag", "1",
          "0 (the intermediate results are not emulated)");
};

// The limits of A2 and A3. For Ascend 950 the page of mhc_post gives none of its own: n by torch_npu's documentation,
// our reading.
void check_streams(In x) {
  const int64_t n = x.size(-2), width = x.size(-1);
  if (on_a5()) {
    require(is_streams(n), "x", show(x), "4, 6 or 8 streams");
    return;
  }
  require(n == 4, "x", show(x), "4 streams");
  require(width >= 1 && width <= 100000 && width % 128 == 0, "x", show(x),
          "a last dimension of 1 to 100000, a multiple of 128");
}

// mirror-cann/ops-transformer mhc/mhc_post/docs/aclnnMhcPost.md. A call without h_res is described by the newest page
// only, after 9.1.0: taken as 9.2.0, our reading.
constexpr auto check_mhc_post = [](In x, In res, In out, In post, Out) {
  require_version(9, on_a5() ? 0 : 1);
  check_table({{"x", true, kHalves, 3, 4, kDocument},
               {"h_res", !on_a5() || !cann_from(9, 2), kSingle, 3, 4, kDocument},
               {"h_out", true, kHalves, 2, 3, kDocument},
               {"h_post", true, kSingle, 2, 3, kDocument}},
              {x, res, out, post});
  refusing_with(kShapeInferenceRefuses, [&x] { check_streams(x); });
  require(x.numel() > 0, "x", show(x), "no empty tensor");  // our reading
  const auto rows = x.sizes().slice(0, static_cast<size_t>(x.dim() - 2));
  const int64_t n = x.size(-2);
  const auto is_each = [&rows](In t, std::initializer_list<int64_t> behind) {
    std::vector<int64_t> shape = rows.vec();
    shape.insert(shape.end(), behind);
    return t.sizes() == at::IntArrayRef(shape);
  };
  require(out.scalar_type() == x.scalar_type() && is_each(out, {x.size(-1)}), "h_out", show(out),
          "x without its streams");
  require(is_each(post, {n}), "h_post", show(post), "one value for each stream");
  if (res.defined()) require(is_each(res, {n, n}), "h_res", show(res), "[..., n, n]");
};

// hicann/ops-transformer mhc/mhc_pre/docs/aclnnMhcPre.md. Two values in alpha (no h_res), and A2 and A3, are described
// by the newest page only, after 9.1.0: taken as 9.2.0, our reading. Its form with n! + 2n rows is not emulated.
constexpr auto check_mhc_pre = [](In x, In phi, In alpha, In bias, In gamma, double, double, Out in, Out post, Out,
                                  Out inverse, Out mix, Out pre) {
  require_version(9, on_a5() ? 0 : 2);
  check_table({{"x", true, kHalves, 3, 4, kDocument},
               {"phi", true, kSingle, 2, 2, kDocument},
               {"alpha", true, kSingle, 1, 1, kDocument},
               {"bias", true, kSingle, 1, 1, kDocument},
               {"gamma", false, kSingle, 2, 2, kDocument},
               {"hIn", true, kHalves, 2, 3, kDocument},
               {"hPost", true, kSingle, 2, 3, kDocument}},
              {x, phi, alpha, bias, gamma, *in, *post});
  const int64_t n = x.size(-2), width = x.size(-1);
  require(x.numel() > 0, "x", show(x), "no empty tensor");
  check_streams(x);
  require(!on_a5() || (width <= 16384 && width % 16 == 0), "x", show(x),
          "a last dimension of at most 16384, a multiple of 16");
  const bool residual = alpha.size(0) == 3;
  require(residual || (alpha.size(0) == 2 && cann_from(9, 2)), "alpha", show(alpha),
          "3 values (from CANN 9.2.0 also 2)");
  const int64_t rows = residual ? n * n + 2 * n : 2 * n;
  require(phi.size(0) == rows && phi.size(1) == n * width, "phi", show(phi),
          "[n*n + 2n, n*D], or [2n, n*D] as alpha has 2 values");
  require(bias.size(0) == rows, "bias", show(bias), "n*n + 2n values, or 2n as alpha has 2");
  if (gamma.defined()) require(gamma.size(0) == n && gamma.size(1) == width, "gamma", show(gamma), "[n, D]");
  const auto given = [](const Out& o) { return o && o->numel(); };
  require(given(inverse) == given(mix) && given(mix) == given(pre), "hMix", "some of invRms, hMix and hPre",
          "all three or none");
};

at::Tensor sinkhorn(In x, double eps, int64_t iterations) {
  at::Tensor m = at::softmax(x, -1).add(eps);
  for (int64_t i = 0; i < iterations; ++i) {
    if (i) m = m.div(m.sum(-1, true).add(eps));
    m = m.div(m.sum(-2, true).add(eps));
  }
  return m;
}

}  // namespace

CHECKED(aclnnMhcSinkhorn, check_sinkhorn,
        [](In x, float eps, int64_t iterations, Out o, Out, Out) { o = sinkhorn(x, eps, iterations); })
CHECKED(aclnnMhcPost, check_mhc_post, [](In x, In res, In out, In post, Out o) {
  const at::Tensor wide = x.to(kF32);
  const at::Tensor mixed = res.defined() ? at::matmul(res.transpose(-1, -2), wide) : wide;
  o = mixed.add(out.to(kF32).unsqueeze(-2).mul(post.unsqueeze(-1)));
})
CHECKED(aclnnMhcPre, check_mhc_pre,
        [](In x, In phi, In alpha, In bias, In gamma, double norm_eps, double hc_eps, Out in, Out post, Out res,
           Out inverse, Out mix, Out pre) {
          const int64_t n = x.size(-2);
          const at::Tensor wide = x.to(kF32);
          const at::Tensor flat = wide.flatten(-2), scaled = gamma.defined() ? wide.mul(gamma).flatten(-2) : flat;
          const at::Tensor r = at::rsqrt(at::mean(flat.square(), {-1}, true).add(norm_eps));
          const at::Tensor product = at::matmul(scaled, phi.t()), gates = product.mul(r);
          const at::Tensor h_pre =
              at::sigmoid(gates.narrow(-1, 0, n).mul(alpha[0]).add(bias.narrow(0, 0, n))).add(hc_eps);
          const at::Tensor h_post = at::sigmoid(gates.narrow(-1, n, n).mul(alpha[1]).add(bias.narrow(0, n, n))).mul(2);
          post = alpha.size(0) == 3 ? h_post : h_post.add(hc_eps);
          in = wide.mul(h_pre.unsqueeze(-1)).sum(-2);
          if (alpha.size(0) == 3)
            res = gates.narrow(-1, 2 * n, n * n).mul(alpha[2]).add(bias.narrow(0, 2 * n, n * n)).unflatten(-1, {n, n});
          else if (res)
            res = at::zeros(res->sizes(), kF32);
          if (inverse && inverse->numel()) inverse = r.squeeze(-1);
          if (mix && mix->numel()) mix = product;
          if (pre && pre->numel()) pre = h_pre;
        })

}  // namespace softnpu
