// vllm-project/vllm-ascend csrc/moe/hc_pre: the definition of the operator; its formula and widths:
// docs/spec/ascend-operators.md 4.2 A. Launchers know the package by this function.
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>

#include "softnpu/opapi/fused_family.h"
#include "softnpu/opapi/fused_norm.h"

namespace softnpu {
namespace {

struct Mixes {
  at::Tensor x, hc_fn, hc_scale, hc_base;
  int64_t hc_mult, hc_sinkhorn_iters;
  double hc_eps, norm_eps;
  Out y, post, comb_frag;
  FIELDS(all, x, hc_fn, hc_scale, hc_base, hc_mult, hc_sinkhorn_iters, hc_eps, norm_eps, y, post,
         comb_frag)

  // How many results there may be is our reading: no tiling looks at them.
  void check_shapes() const {
    const int64_t n = hc_mult, width = x.size(-1);
    require(n == 4, "hc_mult", text(n), "4");
    require(hc_sinkhorn_iters >= 1, "hc_sinkhorn_iters", text(hc_sinkhorn_iters), "at least 1");
    require(x.numel() > 0 && x.size(-2) == n, "x", show(x), "hc_mult streams, and no empty tensor");
    require(width == 4096 || width == 7168, "x", show(x), "a last dimension of 4096 or 7168");
    require_sizes("hc_fn", hc_fn, {n * n + 2 * n, n * width});
    require_sizes("hc_scale", hc_scale, {3});
    require_sizes("hc_base", hc_base, {n * n + 2 * n});
    std::vector<int64_t> sizes = outer(2);
    sizes.push_back(width);
    require_sizes("y", *y, sizes);
    sizes.back() = n;
    require_sizes("post", *post, sizes);
    sizes.push_back(n);
    require_sizes("comb_frag", *comb_frag, sizes);
  }

  std::vector<int64_t> outer(size_t last) const {
    return x.sizes().slice(0, static_cast<size_t>(x.dim()) - last).vec();
  }

  void check() const {
    check_table({{"x", x, true, {kBF16}, 3, 4, kDocument},
                 {"hc_fn", hc_fn, true, kSingle, 2, 2, kDocument},
                 {"hc_scale", hc_scale, true, kSingle, 1, 1, kDocument},
                 {"hc_base", hc_base, true, kSingle, 1, 1, kDocument},
                 {"y", *y, true, {kBF16}, 2, 3, kDocument},
                 {"post", *post, true, kSingle, 2, 3, kDocument},
                 {"comb_frag", *comb_frag, true, kSingle, 3, 4, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [this] { check_shapes(); });
  }

  at::Tensor sinkhorn(In logits) const {
    const auto divided = [this](In m, int64_t axis) {
      return m.div(m.sum(axis, true).add(hc_eps));
    };
    at::Tensor m = divided(at::softmax(logits, -1).add(hc_eps), -2);
    for (int64_t i = 1; i < hc_sinkhorn_iters; ++i) m = divided(divided(m, -1), -2);
    return m;
  }

  void run() const {
    const int64_t n = hc_mult;
    const at::Tensor wide = x.to(kF32), flat = wide.flatten(-2);
    const at::Tensor mixes = at::matmul(flat, hf32(hc_fn).t()).mul(inverse_rms(flat, 1, norm_eps));
    const auto gate = [&](int64_t part, int64_t count) {
      return mixes.narrow(-1, part * n, count)
          .mul(hc_scale[part])
          .add(hc_base.narrow(0, part * n, count));
    };
    y = wide.mul(at::sigmoid(gate(0, n)).add(hc_eps).unsqueeze(-1)).sum(-2);
    post = at::sigmoid(gate(1, n)).mul(2);
    comb_frag = sinkhorn(gate(2, n * n).unflatten(-1, {n, n}));
  }
};

}  // namespace

NAMED(aclnnHcPre, Mixes, all, check, run)

}  // namespace softnpu
