// The hyper-connection's mixing in one call.
// mirror-cann/ops-transformer mhc/mhc_pre_sinkhorn/docs/aclnnMhcPreSinkhorn.md; widths by chip:
// docs/spec/ascend-operators.md 4.2 B, rank 4 only: 12.13 there.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>

#include "fused_family.h"

namespace softnpu {
namespace {

struct PreSinkhorn {
  at::Tensor x, phi, alpha, bias;
  int64_t hc_mult, num_iters;
  double hc_eps, norm_eps;
  bool need_backward;
  Out hin, h_post, h_res, h_pre, hc_before_norm, inv_rms, sum_out, norm_out;
  FIELDS(all, x, phi, alpha, bias, hc_mult, num_iters, hc_eps, norm_eps, need_backward, hin, h_post,
         h_res, h_pre, hc_before_norm, inv_rms, sum_out, norm_out)

  void check_width() const {
    const int64_t width = x.size(3);
    if (on_a5())
      require(width == 4096 || width == 7168, "x", show(x), "a last dimension of 4096 or 7168");
    else
      require(width >= 1 && width <= 100000 && width % 128 == 0, "x", show(x),
              "a last dimension of 1 to 100000, a multiple of 128");
  }

  void check() const {
    require_family();
    check_table({{"x", x, true, kHalves, 4, 4, kDocument},
                 {"phi", phi, true, kSingle, 2, 2, kDocument},
                 {"alpha", alpha, true, kSingle, 1, 1, kDocument},
                 {"bias", bias, true, kSingle, 1, 1, kDocument},
                 {"hin", *hin, true, {x.defined() ? x.scalar_type() : kNone}, 3, 3, kDocument},
                 {"hPost", *h_post, true, kSingle, 3, 3, kDocument},
                 {"hRes", *h_res, true, kSingle, 3, 3, kDocument},
                 {"hPre", *h_pre, need_backward, kSingle, 3, 3, kDocument},
                 {"hcBeforeNorm", *hc_before_norm, need_backward, kSingle, 3, 3, kDocument},
                 {"invRms", *inv_rms, need_backward, kSingle, 3, 3, kDocument},
                 {"sumOut", *sum_out, need_backward, kSingle, 4, 4, kDocument},
                 {"normOut", *norm_out, need_backward, kSingle, 5, 5, kDocument}});
    require(hc_mult == 4, "hcMult", text(hc_mult), "4");
    require(num_iters == 20, "numIters", text(num_iters), "20");
    const int64_t b = x.size(0), s = x.size(1), n = x.size(2), width = x.size(3);
    require(n == hc_mult, "x", show(x), "hcMult streams");
    check_width();
    require_sizes("phi", phi, {n * n + 2 * n, n * width});
    require_sizes("alpha", alpha, {3});
    require_sizes("bias", bias, {n * n + 2 * n});
    require_sizes("hin", *hin, {b, s, width});
    require_sizes("hPost", *h_post, {b, s, n});
    require_sizes("hRes", *h_res, {b, s, n * n});
    if (!need_backward) return;
    require_sizes("hPre", *h_pre, {b, s, n});
    require_sizes("hcBeforeNorm", *hc_before_norm, {b, s, n * n + 2 * n});
    require_sizes("invRms", *inv_rms, {b, s, 1});
    require_sizes("sumOut", *sum_out, {2 * num_iters, b, s, n});
    require_sizes("normOut", *norm_out, {2 * num_iters, b, s, n, n});
  }

  // One step of Sinkhorn along an axis; its place in the intermediate results is `step`.
  at::Tensor divided(In m, int64_t axis, int64_t step) const {
    const at::Tensor sum = m.sum(axis, true).add(hc_eps), result = m.div(sum);
    if (need_backward) {  // the first sum does not exist: its place is not written
      (*sum_out)[step].copy_(sum.squeeze(axis));
      (*norm_out)[step].copy_(result);
    }
    return result;
  }

  at::Tensor sinkhorn(In logits) const {
    at::Tensor m = at::softmax(logits, -1).add(hc_eps);
    if (need_backward) (*norm_out)[0].copy_(m);
    m = divided(m, -2, 1);
    for (int64_t i = 1; i < num_iters; ++i) m = divided(divided(m, -1, 2 * i), -2, 2 * i + 1);
    return m;
  }

  void run() const {
    if (x.numel() == 0) return;
    const int64_t n = hc_mult;
    const at::Tensor wide = x.to(kF32), flat = wide.flatten(-2);
    const at::Tensor r = at::rsqrt(at::mean(flat.square(), {-1}, true).add(norm_eps));
    const at::Tensor product = at::matmul(flat, hf32(phi).t());  // 16-bit x is exact in HF32
    const at::Tensor mixes = product.mul(r);
    const auto gate = [&](int64_t part, int64_t count) {
      return mixes.narrow(-1, part * n, count)
          .mul(alpha[part])
          .add(bias.narrow(0, part * n, count));
    };
    const at::Tensor pre = at::sigmoid(gate(0, n)).add(hc_eps);
    h_post = at::sigmoid(gate(1, n)).mul(2);
    hin = wide.mul(pre.unsqueeze(-1)).sum(-2);
    h_res = sinkhorn(gate(2, n * n).unflatten(-1, {n, n})).flatten(-2);
    if (!need_backward) return;
    h_pre = pre;  // with hcEps: our reading
    hc_before_norm = product;
    inv_rms = r;
  }
};

}  // namespace

NAMED(aclnnMhcPreSinkhorn, PreSinkhorn, all, check, run)

}  // namespace softnpu
