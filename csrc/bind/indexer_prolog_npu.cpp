// What the lightning indexer scores with: queries, weights and new keys, in the form of the keys.
#include <ATen/ops/empty.h>

#include "cache_npu.h"
#include "hadamard_npu.h"
#include "matmul_npu.h"
#include "mx_npu.h"
#include "norm_npu.h"
#include "npu/elementary.h"
#include "npu/indexer.h"
#include "npu/matmul.h"
#include "quant_npu.h"
#include "rotary_npu.h"

namespace dsv4::bind {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// What every operator is called with.
struct Given {
  const at::Tensor &x, &weights_proj, &pooled, &norm;
  double eps;
  const at::Tensor &cos, &sin, &entry_cos, &entry_sin;

  WhyNot why_not() const {
    return first(not_of("x", x, {at::kBFloat16}), empty("x", x), empty("pooled", pooled),
                 not_of("pooled", pooled, {at::kBFloat16}),
                 not_of("weights_proj", weights_proj, {at::kBFloat16}),
                 not_of("k_norm", norm, kFloats),
                 unless(pooled.size(1) == npu::kIndexWidth, "the chip takes keys of 128 channels"));
  }
};

// Where keys are written.
struct Pages {
  const at::Tensor &cache, &slots;
  int64_t block_size;
};

// Rows of queries, then of keys, in one buffer [heads * T + M, D]: what is done to both is done in
// one call.
struct Rows {
  const Given& given;
  int64_t tokens, heads, keys, width;
  at::Tensor all;

  explicit Rows(const Given& given)
      : given(given),
        tokens(given.x.size(0)),
        heads(given.weights_proj.size(0)),
        keys(given.pooled.size(0)),
        width(given.pooled.size(1)),
        all(at::empty({queries() + keys, width}, given.x.options())) {}

  int64_t queries() const { return tokens * heads; }
  at::Tensor of_tokens() const { return queries_of(all).view({tokens, heads * width}); }
  at::Tensor queries_of(const at::Tensor& rows) const { return rows.narrow(0, 0, queries()); }
  at::Tensor keys_of(const at::Tensor& rows) const { return rows.narrow(0, queries(), keys); }
  at::Tensor by_head(const at::Tensor& rows) const { return rows.view({tokens, heads, -1}); }

  // After the queries were written: keys normed, and both turned.
  void norm_and_turn(const NpuCall& call) const {
    norm_into(call, given.pooled, given.norm, given.eps, keys_of(all));
    const Tensors by = {given.cos, given.sin, given.entry_cos, given.entry_sin};
    const Derived joined{"joined rotation of the indexer", by, {heads}};
    if (const Tensors* rows = Step::find(joined)) {
      rotate(call, all, Rotation(rows->at(0), rows->at(1)));
      return;
    }
    rotate(call, by_head(queries_of(all)), Rotation(by.at(0), by.at(1)));
    rotate(call, keys_of(all), Rotation(by.at(2), by.at(3)));
  }
};

// Weights and scales of int8 lie in one fp32 buffer, so that one call casts them.
struct Int8Codes {
  static constexpr const char* op = "indexer_prolog_int8";
  static constexpr int64_t kGroups = npu::QuantMatmul::kNoGroups;

  static WhyNot why_not(const Given& given, const Pages& pages, const at::Tensor&) {
    return Int8Pages::why_not(pages.cache, pages.block_size, given.pooled.size(1));
  }

  static Scales scales(const at::Tensor& of_rows, const at::Tensor& of_weight) {
    return {of_rows.contiguous(), of_weight.contiguous()};
  }

  static Results finish(const NpuCall& call, const Rows& rows, const Pages& pages) {
    const Given& given = rows.given;
    const int64_t count = rows.queries(), size = rows.all.size(0);
    const at::Tensor factors = at::empty({count + size}, given.x.options().dtype(at::kFloat));
    const at::Tensor weights = rows.by_head(factors.narrow(0, 0, count)).squeeze(-1);
    const at::Tensor scales = factors.narrow(0, count, size);
    const at::Tensor codes = at::empty(rows.all.sizes(), given.x.options().dtype(at::kChar));
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
    product_into(call, given.x.contiguous(), given.weights_proj, weights);
    const at::Tensor halves = at::empty(factors.sizes(), given.x.options().dtype(at::kHalf));
    call.launch(npu::Cast{call.in(factors), {npu::AclType::f16}, call.out(halves)});
    const at::Tensor of_rows = halves.narrow(0, count, size).unsqueeze(-1);
    Int8Pages(pages.cache, pages.block_size, rows.width)
        .write(call, rows.keys_of(codes), rows.keys_of(of_rows), pages.slots);
    return {rows.by_head(rows.queries_of(codes)),
            rows.by_head(rows.queries_of(of_rows)).squeeze(-1),
            rows.by_head(halves.narrow(0, 0, count)).squeeze(-1)};
  }
};

struct Fp8Codes {
  static constexpr const char* op = "indexer_prolog_fp8";
  static constexpr int64_t kGroups = npu::QuantMatmul::kMxGroups;

  static WhyNot why_not(const Given& given, const Pages& pages, const at::Tensor& qr) {
    return first(
        unless(qr.size(1) % (2 * kMxBlock) == 0, "the chip takes a multiple of 64 latent channels"),
        Fp8Pages::why_not(pages.cache, given.pooled.size(1)));
  }

  static Scales scales(const at::Tensor& of_rows, const at::Tensor& of_weight) {
    return {paired(of_rows), pairs_of_columns(of_weight)};
  }

  static Results finish(const NpuCall& call, const Rows& rows, const Pages& pages) {
    const Given& given = rows.given;
    const at::Tensor mixed = at::empty(rows.all.sizes(), given.x.options());
    product_into(call, rows.all, sylvester(rows.all), mixed);  // the matrix is symmetric
    const auto [codes, scale] =
        token_quantised(call, rows.by_head(rows.queries_of(mixed)), at::kFloat8_e4m3fn);
    Fp8Pages(pages.cache, pages.block_size, rows.width)
        .write(call, rows.keys_of(mixed), pages.slots);
    return {codes, scale, single_product(call, given.x.contiguous(), given.weights_proj)};
  }
};

template <class Codes>
struct Prolog {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& qr,
                        const at::Tensor&, const at::Tensor& wq_b, const at::Tensor&,
                        const at::Tensor& weights_proj, const at::Tensor& pooled,
                        const at::Tensor& norm, double eps, const at::Tensor& cos,
                        const at::Tensor& sin, const at::Tensor& entry_cos,
                        const at::Tensor& entry_sin, const at::Tensor& cache,
                        const at::Tensor& slots, int64_t block_size) {
    const Given given{x, weights_proj, pooled, norm, eps, cos, sin, entry_cos, entry_sin};
    return first(empty("wq_b", wq_b), given.why_not(),
                 Codes::why_not(given, {cache, slots, block_size}, qr));
  }

  static Results run(const at::Tensor& x, const at::Tensor& qr, const at::Tensor& qr_scale,
                     const at::Tensor& wq_b, const at::Tensor& wq_b_scale,
                     const at::Tensor& weights_proj, const at::Tensor& pooled,
                     const at::Tensor& norm, double eps, const at::Tensor& cos,
                     const at::Tensor& sin, const at::Tensor& entry_cos,
                     const at::Tensor& entry_sin, const at::Tensor& cache, const at::Tensor& slots,
                     int64_t block_size) {
    const Given given{x, weights_proj, pooled, norm, eps, cos, sin, entry_cos, entry_sin};
    const NpuCall call(Codes::op, x);
    const Rows rows(given);
    quant_product(call, qr, wq_b, Codes::scales(qr_scale, wq_b_scale), Codes::kGroups,
                  rows.of_tokens());
    rows.norm_and_turn(call);
    return Codes::finish(call, rows, {cache, slots, block_size});
  }
};

// In bf16, with the product of another weight that takes the same rows.
struct WideProlog {
  using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& wq_b, const at::Tensor& beside,
                        const at::Tensor& weights_proj, const at::Tensor& pooled,
                        const at::Tensor& norm, double eps, const at::Tensor& cos,
                        const at::Tensor& sin, const at::Tensor& entry_cos,
                        const at::Tensor& entry_sin) {
    const Given given{x, weights_proj, pooled, norm, eps, cos, sin, entry_cos, entry_sin};
    return first(empty("wq_b", wq_b), empty("beside", beside), given.why_not());
  }

  static Four run(const at::Tensor& x, const at::Tensor& qr, const at::Tensor& wq_b,
                  const at::Tensor& beside, const at::Tensor& weights_proj,
                  const at::Tensor& pooled, const at::Tensor& norm, double eps,
                  const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& entry_cos,
                  const at::Tensor& entry_sin) {
    const Given given{x, weights_proj, pooled, norm, eps, cos, sin, entry_cos, entry_sin};
    const NpuCall call("indexer_prolog", x);
    const Rows rows(given);
    const at::Tensor product = rows_out(qr, beside, qr.scalar_type());
    paired_product(call, qr, wq_b, beside, rows.of_tokens(), product);
    rows.norm_and_turn(call);
    return {rows.by_head(rows.queries_of(rows.all)), rows.keys_of(rows.all),
            single_product(call, x.contiguous(), weights_proj), product};
  }
};

const NpuRegistration<WideProlog, npu::GroupedMatmul, npu::RmsNorm, npu::InplacePartialRotaryMul,
                      npu::Matmul>
    indexer_prolog("indexer_prolog");
const NpuRegistration<Prolog<Int8Codes>, npu::RotateQuant, npu::QuantMatmul, npu::RmsNorm,
                      npu::InplacePartialRotaryMul, npu::Matmul, npu::Cast, npu::ScatterPaKvCache>
    indexer_prolog_int8(Int8Codes::op);
const NpuRegistration<Prolog<Fp8Codes>, npu::IndexerQuantCache, npu::QuantMatmul, npu::RmsNorm,
                      npu::InplacePartialRotaryMul, npu::Matmul, npu::DynamicQuant>
    indexer_prolog_fp8(Fp8Codes::op);

}  // namespace
}  // namespace dsv4::bind
