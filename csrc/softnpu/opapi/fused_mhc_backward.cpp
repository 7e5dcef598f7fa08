// Gradients of the hyper-connections. Tables: argument, its tensor, required, dtypes, ranks,
// source.
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "fused_family.h"

namespace softnpu {
namespace {

void require_streams(In x) {
  const int64_t n = x.size(-2);
  require(n == 4 || (on_a5() && (n == 6 || n == 8)), "x", show(x),
          "4 streams (on Ascend 950 also 6 or 8)");
  require(x.numel() > 0, "x", show(x), "no empty tensor");
}

std::vector<int64_t> tokens_with(In x, std::initializer_list<int64_t> behind) {
  std::vector<int64_t> sizes = x.sizes().slice(0, static_cast<size_t>(x.dim() - 2)).vec();
  sizes.insert(sizes.end(), behind);
  return sizes;
}

// mirror-cann/ops-transformer mhc/mhc_post_backward/docs/aclnnMhcPostBackward.md. Without hRes the
// streams are added as they are, as mhc_post does here: our reading.
struct PostBackward {
  at::Tensor gradient, x, h_res, h_out, h_post;
  Out dx, dh_res, dh_out, dh_post;
  FIELDS(all, gradient, x, h_res, h_out, h_post, dx, dh_res, dh_out, dh_post)

  void check() const {
    require_version(9, on_a5() ? 0 : 1);
    const auto type = gradient.defined() ? gradient.scalar_type() : kNone;
    check_table({{"gradOutput", gradient, true, kHalves, 3, 4, kDocument},
                 {"x", x, true, {type}, 3, 4, kDocument},
                 {"hRes", h_res, !on_a5() || !cann_from(9, 2), kSingle, 3, 4, kDocument},
                 {"hOut", h_out, true, {type}, 2, 3, kDocument},
                 {"hPost", h_post, true, kSingle, 2, 3, kDocument},
                 {"gradX", *dx, true, {type}, 3, 4, kDocument},
                 {"gradHRes", *dh_res, true, kSingle, 3, 4, kDocument},
                 {"gradHOut", *dh_out, true, {type}, 2, 3, kDocument},
                 {"gradHPost", *dh_post, true, kSingle, 2, 3, kDocument}});
    require_streams(x);
    const int64_t n = x.size(-2), width = x.size(-1);
    require(on_a5() || (width <= 100000 && width % 128 == 0), "x", show(x),
            "a last dimension up to 100000, a multiple of 128");
    require_sizes("gradOutput", gradient, x.sizes().vec());
    if (h_res.defined()) require_sizes("hRes", h_res, tokens_with(x, {n, n}));
    require_sizes("hOut", h_out, tokens_with(x, {width}));
    require_sizes("hPost", h_post, tokens_with(x, {n}));
  }

  void run() const {
    const at::Tensor g = gradient.to(kF32);
    dx = h_res.defined() ? at::matmul(h_res, g) : g;
    dh_res = at::matmul(x.to(kF32), g.transpose(-1, -2));
    dh_out = g.mul(h_post.unsqueeze(-1)).sum(-2);
    dh_post = g.mul(h_out.to(kF32).unsqueeze(-2)).sum(-1);
  }
};

// mirror-cann/ops-transformer mhc/mhc_pre_backward/docs/aclnnMhcPreBackward.md; without gamma its
// gradient is zeros (our reading).
struct PreBackward {
  at::Tensor x, phi, alpha, dh_in, dh_post, dh_res, inv_rms, h_mix, h_pre, h_post, gamma, dx_post;
  float hc_eps;
  Out dx, dphi, dalpha, dbias, dgamma;
  FIELDS(all, x, phi, alpha, dh_in, dh_post, dh_res, inv_rms, h_mix, h_pre, h_post, gamma, dx_post,
         hc_eps, dx, dphi, dalpha, dbias, dgamma)

  void check() const {
    require_version(9, on_a5() ? 0 : 2);
    const auto type = x.defined() ? x.scalar_type() : kNone;
    check_table({{"x", x, true, kHalves, 3, 4, kDocument},
                 {"phi", phi, true, kSingle, 2, 2, kDocument},
                 {"alpha", alpha, true, kSingle, 1, 1, kDocument},
                 {"gradHIn", dh_in, true, {type}, 2, 3, kDocument},
                 {"gradHPost", dh_post, true, kSingle, 2, 3, kDocument},
                 {"gradHRes", dh_res, true, kSingle, 3, 4, kDocument},
                 {"invRms", inv_rms, true, kSingle, 1, 2, kDocument},
                 {"hMix", h_mix, true, kSingle, 2, 3, kDocument},
                 {"hPre", h_pre, true, kSingle, 2, 3, kDocument},
                 {"hPost", h_post, true, kSingle, 2, 3, kDocument},
                 {"gamma", gamma, false, kSingle, 2, 2, kDocument},
                 {"gradXPost", dx_post, false, {type}, 3, 4, kDocument}});
    require_streams(x);
    const int64_t n = x.size(-2), width = x.size(-1), rows = n * n + 2 * n;
    require(width <= 16384 && width % 64 == 0, "x", show(x),
            "a last dimension up to 16384, a multiple of 64");
    require_sizes("phi", phi, {rows, n * width});
    require_sizes("alpha", alpha, {3});
    require_sizes("gradHIn", dh_in, tokens_with(x, {width}));
    require_sizes("gradHPost", dh_post, tokens_with(x, {n}));
    require_sizes("gradHRes", dh_res, tokens_with(x, {n, n}));
    require_sizes("invRms", inv_rms, tokens_with(x, {}));
    require_sizes("hMix", h_mix, tokens_with(x, {rows}));
    require_sizes("hPre", h_pre, tokens_with(x, {n}));
    require_sizes("hPost", h_post, tokens_with(x, {n}));
    if (gamma.defined()) require_sizes("gamma", gamma, {n, width});
    if (dx_post.defined()) require_sizes("gradXPost", dx_post, x.sizes().vec());
  }

  void run() const {
    const int64_t n = x.size(-2), width = x.size(-1);
    const auto flat = [](In t, int64_t last) { return t.reshape({-1, last}); };
    const at::Tensor wide = flat(x.to(kF32), n * width), streams = wide.view({-1, n, width});
    const at::Tensor din = flat(dh_in.to(kF32), width), r = inv_rms.reshape({-1, 1});
    const at::Tensor pre = flat(h_pre, n), post = flat(h_post, n), mix = flat(h_mix, phi.size(0));
    const at::Tensor res = flat(dh_res, n * n);
    const at::Tensor s = pre.sub(hc_eps), dpre = streams.mul(din.unsqueeze(1)).sum(-1);
    const at::Tensor dgate_pre = dpre.mul(s).mul(s.neg().add(1));
    const at::Tensor dgate_post = flat(dh_post, n).mul(post).mul(post.div(-2).add(1));
    const at::Tensor dgates = at::cat({dgate_pre, dgate_post, res}, 1);
    const at::Tensor factors =
        at::cat({alpha[0].expand({n}), alpha[1].expand({n}), alpha[2].expand({n * n})});
    const at::Tensor scaled = dgates.mul(factors), dmix = scaled.mul(r);
    const at::Tensor g = gamma.defined() ? gamma.reshape({1, -1}) : at::Tensor();
    const at::Tensor back = at::matmul(dmix, phi);
    dphi = at::matmul(dmix.t(), g.defined() ? wide.mul(g) : wide);
    const auto parts = dgates.mul(mix).mul(r).sum(0).split_with_sizes({n, n, n * n});
    dalpha = at::stack({parts[0].sum(), parts[1].sum(), parts[2].sum()});
    dbias = dgates.sum(0);
    const at::Tensor dr = scaled.mul(mix).sum(-1, true);
    at::Tensor total = (g.defined() ? back.mul(g) : back)
                           .sub(dr.mul(r.pow(3)).div(n * width).mul(wide))
                           .add(flat(pre.unsqueeze(-1).mul(din.unsqueeze(1)), n * width));
    if (dx_post.defined()) total = total.add(flat(dx_post.to(kF32), n * width));
    dx = total.view(x.sizes());
    if (dgamma && dgamma->numel())
      dgamma = g.defined() ? wide.mul(back).sum(0).view(dgamma->sizes())
                           : at::zeros(dgamma->sizes(), kF32);
  }
};

}  // namespace

NAMED(aclnnMhcPostBackward, PostBackward, all, check, run)
NAMED(aclnnMhcPreBackward, PreBackward, all, check, run)

}  // namespace softnpu
