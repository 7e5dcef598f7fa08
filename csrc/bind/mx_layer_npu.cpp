// Whole steps of a layer in MX formats: the heads' output projection, and the experts.
#include <ATen/ops/empty.h>

#include <cmath>

#include "moe_npu.h"
#include "mx_npu.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

// Heads are quantised, then each group of them is multiplied by its rows of wo_a.
struct Projection {
  static WhyNot why_not(const Context&, const at::Tensor& o, const at::Tensor& weight,
                        const at::Tensor&) {
    return first(empty("o", o), empty("weight", weight),
                 unless(weight.size(2) % (2 * kMxBlock) == 0,
                        "the chip takes groups of a multiple of 64 channels"));
  }

  static at::Tensor run(const at::Tensor& o, const at::Tensor& weight, const at::Tensor& scale) {
    using Product = npu::TransposeQuantBatchMatmul;
    const int64_t tokens = o.size(0), groups = weight.size(0);
    const NpuCall call("mx_output_projection", o);
    const MxRows rows = mx_quantised(call, o.contiguous().view({tokens, groups, -1}));
    const at::Tensor wo_a = weight.contiguous(), pairs = paired(scale);
    const at::Tensor out = at::empty({tokens, groups, weight.size(1)}, o.options());
    call.launch(Product{call.in(rows.codes),
                        call.in(wo_a),
                        {},
                        call.maybe(&rows.pairs),
                        call.maybe(&pairs),
                        static_cast<int32_t>(npu::AclType::bf16),
                        Product::kMxGroups,
                        {{1, 0, 2}},
                        {{0, 2, 1}},
                        {{1, 0, 2}},
                        Product::kNotSplit,
                        call.out(out)});
    return out.flatten(1);
  }
};

struct Moe {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& ids, const at::Tensor&, const at::Tensor& w13_scale,
                        const at::Tensor&, const at::Tensor& w2_scale, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, double limit) {
    return first(
        empty("x", x), unless(w13_scale.size(0) > 1, "the chip takes at least two experts"),
        unless(ids.size(1) <= w13_scale.size(0), "the chip takes no more choices than experts"),
        unless(x.size(1) % 64 == 0, "the chip takes a multiple of 64 channels"),
        unless(w13_scale.size(1) % 128 == 0 && w13_scale.size(1) >= 256,
               "the chip takes a multiple of 64 channels of each half, from 128 on"),
        unless(w2_scale.size(1) % 32 == 0, "the chip takes a multiple of 32 rows"),
        unless(std::isfinite(limit), "the chip has no form without a limit"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids,
                        const at::Tensor& w13, const at::Tensor& w13_scale, const at::Tensor& w2,
                        const at::Tensor& w2_scale, const at::Tensor& shared_w13,
                        const at::Tensor& shared_w13_scale, const at::Tensor& shared_w2,
                        const at::Tensor& shared_w2_scale, double limit) {
    const NpuCall call("mx_moe", x);
    const MxRows rows = mx_quantised(call, x.contiguous());
    const Routed routed(call, rows.codes, rows.pairs, ids.contiguous(), w13_scale.size(0));
    const Groups groups = Groups::counted(routed.counts);
    const at::Tensor sums = tiled_product(call, MxRows(routed.rows, routed.scales),
                                          w13.contiguous(), w13_scale, groups);
    const at::Tensor chosen =
        tiled_product(call, mx_activated(call, sums, limit), w2.contiguous(), w2_scale, groups);

    const at::Tensor own_sums = product_of(call, rows, shared_w13, shared_w13_scale);
    const at::Tensor shared =
        product_of(call, mx_activated(call, own_sums, limit), shared_w2, shared_w2_scale);

    return summed(call, chosen, routed.to_row, shared, weights);
  }

 private:
  static at::Tensor product_of(const NpuCall& call, const MxRows& rows, const at::Tensor& weight,
                               const at::Tensor& scale) {
    const at::Tensor out = rows_out(rows.codes, weight, at::kBFloat16);
    quant_product(call, rows.codes, weight, {rows.pairs, pairs_of_columns(scale)},
                  npu::QuantMatmul::kMxGroups, out);
    return out;
  }
};

const NpuRegistration<Projection, npu::TransposeQuantBatchMatmul, npu::DynamicMxQuant> projection(
    "mx_output_projection");
const NpuRegistration<Moe, npu::MoeInitRouting, npu::GroupedMatmulWeightNz, npu::SwigluGroupQuant,
                      npu::QuantMatmul, npu::MoeFinalizeRouting, npu::DynamicMxQuant>
    mx_moe("mx_moe");

}  // namespace
}  // namespace dsv4::bind
