#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <cmath>

#include "matmul_npu.h"
#include "moe_npu.h"
#include "npu/matmul.h"
#include "step.h"
#include "swiglu_npu.h"

namespace dsv4::bind {
namespace {

// The only count of one group that has all rows, int64 [1] like `counts`.
at::Tensor count_of(int64_t rows, const at::Tensor& counts) {
  const auto make = [&] { return Tensors{at::full({1}, rows, counts.options())}; };
  return Step::once({"count of all rows", {}, {rows, counts.get_device()}}, make).at(0);
}

constexpr int64_t kNoGroups = npu::QuantMatmul::kNoGroups;

struct Int8Moe {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& ids, const at::Tensor& w13, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, double limit) {
    return first(empty("x", x), unless(w13.size(0) > 1, "the chip takes at least two experts"),
                 unless(w13.size(1) % 64 == 0 && w13.size(1) <= 7232,
                        "the chip takes a multiple of 64 channels of gate and up, up to 7232"),
                 unless(ids.size(1) <= w13.size(0), "the chip takes no more choices than experts"),
                 unless(std::isfinite(limit), "the chip has no form without a limit"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids,
                        const at::Tensor& w13, const at::Tensor& w13_scale, const at::Tensor& w2,
                        const at::Tensor& w2_scale, const at::Tensor& shared_w13,
                        const at::Tensor& shared_w13_scale, const at::Tensor& shared_w2,
                        const at::Tensor& shared_w2_scale, double limit) {
    const NpuCall call("int8_moe", x);
    const int64_t tokens = x.size(0), inner = w13.size(1);
    const auto sums_of = [&](int64_t rows) {
      return at::empty({rows, inner}, x.options().dtype(at::kInt));
    };
    const auto rows_of = [&](int64_t rows) { return at::empty({rows, x.size(1)}, x.options()); };

    const auto [codes, scale] = token_quantised(call, x.contiguous(), at::kChar);
    const Routed routed(call, codes, scale, ids.contiguous(), w13.size(0));
    const at::Tensor sums = sums_of(ids.numel()), chosen = rows_of(ids.numel());
    grouped_product(call, routed.rows, w13, Groups::counted(routed.counts), sums);
    const auto [hidden, hidden_scale] =
        activated(call, sums, w13_scale.contiguous(), routed.scales, routed.counts, limit);
    grouped_product(call, hidden, w2, Groups::counted(routed.counts), chosen,
                    {hidden_scale, w2_scale.contiguous()});

    const at::Tensor all = count_of(tokens, routed.counts);
    const at::Tensor own_sums = sums_of(tokens), shared = rows_of(tokens);
    const at::Tensor columns13 = shared_w13_scale.contiguous();
    quant_product(call, codes, shared_w13, {at::Tensor(), columns13}, kNoGroups, own_sums);
    const auto [own, own_scale] = activated(call, own_sums, columns13, scale, all, limit);
    quant_product(call, own, shared_w2, {own_scale, shared_w2_scale.contiguous()}, kNoGroups,
                  shared);

    return summed(call, chosen, routed.to_row, shared, weights);
  }
};

const NpuRegistration<Int8Moe, npu::MoeInitRouting, npu::GroupedMatmul, npu::DequantSwigluQuant,
                      npu::QuantMatmul, npu::MoeFinalizeRouting, npu::DynamicQuant>
    int8_moe("int8_moe");

}  // namespace
}  // namespace dsv4::bind
