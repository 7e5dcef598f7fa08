// What the lightning indexer scores with: queries, weights and new keys, in int8.
#include <ATen/ops/empty.h>

#include "cache_npu.h"
#include "hadamard_npu.h"
#include "matmul_npu.h"
#include "norm_npu.h"
#include "npu/elementary.h"
#include "npu/indexer.h"
#include "npu/matmul.h"
#include "quant_npu.h"
#include "rotary_npu.h"

namespace dsv4::bind {
namespace {

// Rows of queries, then of keys, in one buffer [heads * T + M, D]: both are turned, multiplied by
// the Hadamard matrix and quantised in one call each. Weights and scales lie in one fp32 buffer, so
// that one call casts them.
struct Rows {
  int64_t tokens, heads, keys, width;
  at::Tensor all, factors;

  Rows(const at::Tensor& x, int64_t heads, const at::Tensor& pooled)
      : tokens(x.size(0)),
        heads(heads),
        keys(pooled.size(0)),
        width(pooled.size(1)),
        all(at::empty({queries() + keys, width}, x.options())),
        factors(at::empty({2 * queries() + keys}, x.options().dtype(at::kFloat))) {}

  int64_t queries() const { return tokens * heads; }
  at::Tensor of_queries() const { return all.narrow(0, 0, queries()); }
  at::Tensor of_keys() const { return all.narrow(0, queries(), keys); }
  at::Tensor weights() const { return factors.narrow(0, 0, queries()).view({tokens, heads}); }
  at::Tensor scales() const { return factors.narrow(0, queries(), queries() + keys); }
};

struct Prolog {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor& wq_b, const at::Tensor&, const at::Tensor& weights_proj,
                        const at::Tensor& pooled, const at::Tensor& norm, double, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor& cache, const at::Tensor&, int64_t block_size) {
    return first(not_of("x", x, {at::kBFloat16}), empty("x", x), empty("pooled", pooled),
                 not_of("pooled", pooled, {at::kBFloat16}),
                 not_of("weights_proj", weights_proj, {at::kBFloat16}),
                 not_of("k_norm", norm, kFloats), empty("wq_b", wq_b),
                 unless(pooled.size(1) == npu::kIndexWidth, "the chip takes keys of 128 channels"),
                 Int8Pages::why_not(cache, block_size, pooled.size(1)));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(
      const at::Tensor& x, const at::Tensor& qr, const at::Tensor& qr_scale, const at::Tensor& wq_b,
      const at::Tensor& wq_b_scale, const at::Tensor& weights_proj, const at::Tensor& pooled,
      const at::Tensor& norm, double eps, const at::Tensor& cos, const at::Tensor& sin,
      const at::Tensor& entry_cos, const at::Tensor& entry_sin, const at::Tensor& cache,
      const at::Tensor& slots, int64_t block_size) {
    const NpuCall call("indexer_prolog_int8", x);
    const Rows rows(x, weights_proj.size(0), pooled);
    const at::Tensor queries = rows.of_queries(), keys = rows.of_keys();
    const at::Tensor heads = queries.view({rows.tokens, rows.heads * rows.width});
    quant_product(call, qr, wq_b, {qr_scale.contiguous(), wq_b_scale.contiguous()},
                  npu::QuantMatmul::kNoGroups, heads);
    norm_into(call, pooled, norm, eps, keys);
    turn(call, rows, {cos, sin, entry_cos, entry_sin});

    const at::Tensor codes = at::empty(rows.all.sizes(), rows.all.options().dtype(at::kChar));
    const at::Tensor scales = rows.scales(), weights = rows.weights();
    using Rotate = npu::RotateQuant;
    call.launch(Rotate{call.in(rows.all),
                       call.in(sylvester(rows.all)),
                       {},
                       Rotate::kLastAxis,
                       {"rint"},
                       Rotate::kAmax,
                       0.0,
                       false,
                       call.out(codes),
                       call.out(scales)});
    product_into(call, x.contiguous(), weights_proj, weights);
    const at::Tensor halves = at::empty(rows.factors.sizes(), x.options().dtype(at::kHalf));
    call.launch(npu::Cast{call.in(rows.factors), {npu::AclType::f16}, call.out(halves)});

    const int64_t count = rows.queries();
    Int8Pages(cache, block_size, rows.width)
        .write(call, codes.narrow(0, count, rows.keys),
               halves.narrow(0, 2 * count, rows.keys).unsqueeze(-1), slots);
    const auto of_heads = [&](int64_t first) {
      return halves.narrow(0, first, count).view({rows.tokens, rows.heads});
    };
    return {codes.narrow(0, 0, count).view({rows.tokens, rows.heads, rows.width}), of_heads(count),
            of_heads(0)};
  }

 private:
  static void turn(const NpuCall& call, const Rows& rows, const Tensors& by) {
    const Derived joined{"joined rotation of the indexer", by, {rows.heads}};
    if (const Tensors* all = Step::find(joined)) {
      rotate(call, rows.all, Rotation(all->at(0), all->at(1)));
      return;
    }
    const at::Tensor queries = rows.of_queries().view({rows.tokens, rows.heads, rows.width});
    rotate(call, queries, Rotation(by.at(0), by.at(1)));
    rotate(call, rows.of_keys(), Rotation(by.at(2), by.at(3)));
  }
};

const NpuRegistration<Prolog, npu::RotateQuant, npu::QuantMatmul, npu::RmsNorm,
                      npu::InplacePartialRotaryMul, npu::Matmul, npu::Cast, npu::ScatterPaKvCache>
    indexer_prolog_int8("indexer_prolog_int8");

}  // namespace
}  // namespace dsv4::bind
