#include <ATen/ops/empty.h>

#include <cmath>

#include "matmul_npu.h"
#include "moe_npu.h"
#include "npu/matmul.h"
#include "swiglu_npu.h"

namespace dsv4::bind {
namespace {

struct Bf16Moe {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& ids, const at::Tensor& w13, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, double limit) {
    return first(empty("x", x), unless(w13.size(0) > 1, "the chip takes at least two experts"),
                 unless(ids.size(1) <= w13.size(0), "the chip takes no more choices than experts"),
                 unless(std::isfinite(limit), "the chip has no form without a limit"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids,
                        const at::Tensor& w13, const at::Tensor& w2, const at::Tensor& shared_w13,
                        const at::Tensor& shared_w2, double limit) {
    const NpuCall call("bf16_moe", x);
    const auto rows_of = [&](int64_t rows, int64_t channels) {
      return at::empty({rows, channels}, x.options());
    };
    const at::Tensor tokens = x.contiguous();
    const int64_t choices = ids.numel(), width = x.size(1), inner = w13.size(1);

    const Routed routed(call, tokens, std::nullopt, ids.contiguous(), w13.size(0));
    const Groups groups = Groups::counted(routed.counts);
    const at::Tensor both = rows_of(choices, inner), chosen = rows_of(choices, width);
    grouped_product(call, routed.rows, w13, groups, both);
    grouped_product(call, clipped(call, both, limit), w2, groups, chosen);

    const at::Tensor own = rows_of(x.size(0), inner), shared = rows_of(x.size(0), width);
    product_into(call, tokens, shared_w13, own);
    product_into(call, clipped(call, own, limit), shared_w2, shared);

    return summed(call, chosen, routed.to_row, shared, weights);
  }
};

const NpuRegistration<Bf16Moe, npu::MoeInitRouting, npu::GroupedMatmul, npu::ClippedSwiglu,
                      npu::Matmul, npu::MoeFinalizeRouting>
    bf16_moe("bf16_moe");

}  // namespace
}  // namespace dsv4::bind
