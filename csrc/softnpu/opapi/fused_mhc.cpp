// Hyper-connection operators. The oldest pages are those of CANN 9.1.0; torch_npu asks for 9.0.0,
// which is our reading for Ascend 950. Tables: argument, its tensor, required, dtypes, smallest and
// largest rank, source.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include "fused_family.h"

namespace softnpu {
namespace {

bool is_streams(int64_t n) { return n == 4 || n == 6 || n == 8; }

// mirror-cann/ops-transformer mhc/mhc_sinkhorn/docs/aclnnMhcSinkhorn.md
struct Sinkhorn {
  at::Tensor x;
  float eps;
  int64_t num_iters;
  Out output, norm_out, sum_out;
  FIELDS(all, x, eps, num_iters, output, norm_out, sum_out)

  void check() const {
    require_generation(kOnA5);
    require_version(9, 0);
    check_table({{"x", x, true, kSingle, 3, 4, kDocument},
                 {"output", *output, true, kSingle, 3, 4, kDocument}});
    require(is_streams(x.size(-1)) && x.size(-2) == x.size(-1), "x", show(x),
            "[..., n, n] with n 4, 6 or 8");
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(num_iters >= 1 && num_iters <= 100, "num_iters", std::to_string(num_iters), "1 to 100");
    // Their sizes are documented, the order of their values is not (it depends on how the kernel
    // splits the work).
    require((!norm_out || norm_out->numel() == 0) && (!sum_out || sum_out->numel() == 0),
            "out_flag", "1", "0 (the intermediate results are not emulated)");
  }

  void run() const {
    at::Tensor m = at::softmax(x, -1).add(eps);
    for (int64_t i = 0; i < num_iters; ++i) {
      if (i) m = m.div(m.sum(-1, true).add(eps));
      m = m.div(m.sum(-2, true).add(eps));
    }
    output = m;
  }
};

// The limits of A2 and A3. For Ascend 950 the page of mhc_post gives none of its own: n by
// torch_npu's documentation, our reading.
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

// mirror-cann/ops-transformer mhc/mhc_post/docs/aclnnMhcPost.md. A call without h_res is described
// by the newest page only, after 9.1.0: taken as 9.2.0, our reading.
struct Post {
  at::Tensor x, h_res, h_out, h_post;
  Out out;
  FIELDS(all, x, h_res, h_out, h_post, out)

  void check() const {
    require_version(9, on_a5() ? 0 : 1);
    check_table({{"x", x, true, kHalves, 3, 4, kDocument},
                 {"h_res", h_res, !on_a5() || !cann_from(9, 2), kSingle, 3, 4, kDocument},
                 {"h_out", h_out, true, kHalves, 2, 3, kDocument},
                 {"h_post", h_post, true, kSingle, 2, 3, kDocument}});
    refusing_with(kShapeInferenceRefuses, [&] { check_streams(x); });
    require(x.numel() > 0, "x", show(x), "no empty tensor");  // our reading
    const auto rows = x.sizes().slice(0, static_cast<size_t>(x.dim() - 2));
    const int64_t n = x.size(-2);
    const auto is_each = [&rows](In t, std::initializer_list<int64_t> behind) {
      std::vector<int64_t> shape = rows.vec();
      shape.insert(shape.end(), behind);
      return t.sizes() == at::IntArrayRef(shape);
    };
    require(h_out.scalar_type() == x.scalar_type() && is_each(h_out, {x.size(-1)}), "h_out",
            show(h_out), "x without its streams");
    require(is_each(h_post, {n}), "h_post", show(h_post), "one value for each stream");
    if (h_res.defined()) require(is_each(h_res, {n, n}), "h_res", show(h_res), "[..., n, n]");
  }

  void run() const {
    const at::Tensor wide = x.to(kF32);
    const at::Tensor mixed = h_res.defined() ? at::matmul(h_res.transpose(-1, -2), wide) : wide;
    out = mixed.add(h_out.to(kF32).unsqueeze(-2).mul(h_post.unsqueeze(-1)));
  }
};

// hicann/ops-transformer mhc/mhc_pre/docs/aclnnMhcPre.md. Two values in alpha (no h_res), and A2
// and A3, are described by the newest page only, after 9.1.0: taken as 9.2.0, our reading. Its form
// with n! + 2n rows is not emulated.
struct Pre {
  at::Tensor x, phi, alpha, bias, gamma;
  double norm_eps, hc_eps;
  Out h_in, h_post, h_res, inv_rms, h_mix, h_pre;
  FIELDS(all, x, phi, alpha, bias, gamma, norm_eps, hc_eps, h_in, h_post, h_res, inv_rms, h_mix,
         h_pre)

  void check() const {
    require_version(9, on_a5() ? 0 : 2);
    check_table({{"x", x, true, kHalves, 3, 4, kDocument},
                 {"phi", phi, true, kSingle, 2, 2, kDocument},
                 {"alpha", alpha, true, kSingle, 1, 1, kDocument},
                 {"bias", bias, true, kSingle, 1, 1, kDocument},
                 {"gamma", gamma, false, kSingle, 2, 2, kDocument},
                 {"hIn", *h_in, true, kHalves, 2, 3, kDocument},
                 {"hPost", *h_post, true, kSingle, 2, 3, kDocument}});
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
    if (gamma.defined())
      require(gamma.size(0) == n && gamma.size(1) == width, "gamma", show(gamma), "[n, D]");
    const auto given = [](const Out& o) { return o && o->numel(); };
    require(given(inv_rms) == given(h_mix) && given(h_mix) == given(h_pre), "hMix",
            "some of invRms, hMix and hPre", "all three or none");
  }

  void run() const {
    const int64_t n = x.size(-2);
    const at::Tensor wide = x.to(kF32);
    const at::Tensor flat = wide.flatten(-2),
                     scaled = gamma.defined() ? wide.mul(gamma).flatten(-2) : flat;
    const at::Tensor r = at::rsqrt(at::mean(flat.square(), {-1}, true).add(norm_eps));
    const at::Tensor product = at::matmul(scaled, phi.t()), gates = product.mul(r);
    const auto gate = [&](int64_t part, int64_t count) {
      return gates.narrow(-1, part * n, count)
          .mul(alpha[part])
          .add(bias.narrow(0, part * n, count));
    };
    const at::Tensor pre = at::sigmoid(gate(0, n)).add(hc_eps),
                     post = at::sigmoid(gate(1, n)).mul(2);
    h_post = alpha.size(0) == 3 ? post : post.add(hc_eps);
    h_in = wide.mul(pre.unsqueeze(-1)).sum(-2);
    if (alpha.size(0) == 3)
      h_res = gate(2, n * n).unflatten(-1, {n, n});
    else if (h_res)
      h_res = at::zeros(h_res->sizes(), kF32);
    if (inv_rms && inv_rms->numel()) inv_rms = r.squeeze(-1);
    if (h_mix && h_mix->numel()) h_mix = product;
    if (h_pre && h_pre->numel()) h_pre = pre;
  }
};

}  // namespace

NAMED(aclnnMhcSinkhorn, Sinkhorn, all, check, run)
NAMED(aclnnMhcPost, Post, all, check, run)
NAMED(aclnnMhcPre, Pre, all, check, run)

}  // namespace softnpu
