// What multi-head latent attention computes before attention: queries, and the rows of its two
// caches. Documents: hicann/ops-transformer attention/mla_prolog, mla_prolog_v2 and mla_prolog_v3
// (docs/ of each). Table: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sqrt.h>

#include "fused_family.h"
#include "fused_quant.h"
#include "graph.h"
#include "matrix.h"

namespace softnpu {
namespace {

struct Prolog {
  at::Tensor x, dq, uq_qr, uk, dkv_kr, gamma_cq, gamma_ckv, sin, cos;
  at::Tensor scale_x, scale_dq, scale_uq_qr, scale_dkv_kr, quant_ckv, quant_ckr, smooth_cq;
  double epsilon_cq, epsilon_ckv, qc_scale = 1, kc_scale = 1;
  bool quantised_query = false;  // each head of a token has a scale

  struct Result {
    at::Tensor query, query_rope, query_scale, norm, norm_scale, kv, kr;
  };
  Result run() const;
};

at::Tensor rows_of(In x) { return x.reshape({-1, x.size(-1)}); }

at::Tensor rounded(In x) { return x.to(kBF16).to(kF32); }

// Sums of int8 products are exact in fp64.
at::Tensor product(In x, In weight, In x_scale, In weight_scale) {
  if (weight.scalar_type() != kI8) return at::matmul(x.to(kF32), weight.to(kF32));
  const at::Tensor sums = at::matmul(x.to(at::kDouble), weight.to(at::kDouble)).to(kF32);
  return sums.mul(x_scale.reshape({-1, 1})).mul(weight_scale.reshape({1, -1}));
}

at::Tensor normed(In x, In gamma, double epsilon, double scale) {
  const at::Tensor by = at::sqrt(x.square().mean(-1, true).add(epsilon));
  return x.div(by).mul(gamma.to(kF32)).mul(scale);
}

// Pairs of neighbours are turned; the results lie in halves.
at::Tensor turned(In x, In sin, In cos) {
  const at::Tensor pairs = x.unflatten(-1, {-1, 2});
  const at::Tensor even = pairs.select(-1, 0), odd = pairs.select(-1, 1);
  return at::cat({even, odd}, -1).mul(cos).add(at::cat({odd.neg(), even}, -1).mul(sin));
}

at::Tensor int8_by(In x, In scale) { return at::round(x.mul(scale)).clamp(-128, 127); }

Prolog::Result Prolog::run() const {
  Result result;
  const at::Tensor tokens = rows_of(x), s = rows_of(sin).to(kF32), c = rows_of(cos).to(kF32);
  const int64_t heads = uk.size(0), width = uk.size(1), rank = uk.size(2);
  const bool int8_up = uq_qr.scalar_type() == kI8;
  at::Tensor down = product(tokens, dq, scale_x, scale_dq);
  if (dq.scalar_type() != kI8) down = rounded(down);
  at::Tensor norm = normed(down, gamma_cq, epsilon_cq, qc_scale);
  if (int8_up) {
    if (smooth_cq.defined()) norm = norm.mul(smooth_cq.reshape({1, -1}));
    const Int8Rows rows = quantised_rows(norm);
    result.norm = rows.y, result.norm_scale = rows.scale;
  } else {
    result.norm = rounded(norm);
  }
  at::Tensor up =
      product(int8_up ? result.norm.to(kI8) : result.norm, uq_qr, result.norm_scale, scale_uq_qr);
  if (!int8_up) up = rounded(up);
  up = up.view({up.size(0), heads, -1});
  const at::Tensor nope = rounded(up.slice(-1, 0, width)).transpose(0, 1);
  result.query = rounded(at::matmul(nope, uk.to(kF32)).transpose(0, 1));
  result.query_rope = rounded(turned(up.slice(-1, width), s.unsqueeze(1), c.unsqueeze(1)));
  const at::Tensor latent = product(tokens, dkv_kr, scale_x, scale_dkv_kr);
  result.kv = normed(latent.slice(-1, 0, rank), gamma_ckv, epsilon_ckv, kc_scale);
  result.kr = turned(latent.slice(-1, rank), s, c);
  if (quantised_query) {
    const Int8Rows rows = quantised_rows(result.query);
    result.query = rows.y, result.query_scale = rows.scale.unsqueeze(-1);
    // So that the product with the quantised cache has one scale for both parts.
    result.query_rope = result.query_rope.mul(quant_ckv.reshape({-1})).div(result.query_scale);
  }
  if (quant_ckv.defined()) result.kv = int8_by(result.kv, quant_ckv.reshape({1, -1}));
  if (quant_ckr.defined()) result.kr = int8_by(result.kr, quant_ckr.reshape({1, -1}));
  return result;
}

// Rows of [blocks, rows of a block, 1, width]; the cache may have gaps between its blocks.
void store_rows(const Out& cache, In index, In rows) {
  cache.touch();
  const int64_t block = cache->size(1);
  const at::Tensor places = index.reshape({-1}).to(at::kLong).contiguous();
  for (int64_t i = 0; i < places.numel(); ++i) {
    const int64_t place = places.const_data_ptr<int64_t>()[i];
    cache->select(0, place / block).select(0, place % block).copy_(rows[i].unsqueeze(0));
  }
}

void store(const Prolog::Result& result, In index, const Out& query, const Out& query_rope,
           const Out& kv_cache, const Out& kr_cache) {
  query = result.query.reshape(query->sizes());
  query_rope = result.query_rope.reshape(query_rope->sizes());
  if (!kv_cache->numel()) return;
  expect_values(index, 0, kv_cache->size(0) * kv_cache->size(1), "cacheIndex");
  store_rows(kv_cache, index, result.kv);
  store_rows(kr_cache, index, result.kr);
}

struct MlaProlog {
  at::Tensor x, uk, gamma_cq, gamma_ckv, sin, cos, index;
  Matrix dq, uq_qr, dkv_kr;
  Out kv_cache, kr_cache;
  at::Tensor scale_x, scale_dq, scale_uq_qr, scale_dkv_kr, quant_ckv, quant_ckr, smooth_cq, lengths,
      clip_alpha;
  double epsilon_cq, epsilon_ckv, qc_scale = 1, kc_scale = 1;
  std::string cache_mode;
  int64_t weight_mode = 0, cache_mode_quant = 0, query_mode = 0, joined = 0, joined_scales = 0,
          tile = 128;
  Out query, query_rope;
  OptionalOut query_scale, norm, norm_scale;
  FIELDS(front, x, dq, uq_qr, uk, dkv_kr, gamma_cq, gamma_ckv, sin, cos)
  FIELDS(place, index)
  FIELDS(caches, kv_cache, kr_cache)
  FIELDS(scales, scale_x, scale_dq, scale_uq_qr, scale_dkv_kr, quant_ckv, quant_ckr, smooth_cq)
  FIELDS(new_inputs, lengths, clip_alpha)
  FIELDS(numbers, epsilon_cq, epsilon_ckv, cache_mode)
  FIELDS(modes, weight_mode, cache_mode_quant, query_mode, joined, joined_scales, tile, qc_scale,
         kc_scale)
  FIELDS(results, query, query_rope)
  FIELDS(scale_result, query_scale)
  FIELDS(norm_results, norm, norm_scale)
  auto v2() {
    return front() + place() + caches() + scales() + numbers() + results() + scale_result();
  }
  auto v3() {
    return front() + caches() + place() + scales() + new_inputs() + numbers() + modes() +
           results() + scale_result() + norm_results();
  }

  int64_t tokens() const { return x.numel() / x.size(-1); }

  // NZ; where torch_npu has internal formats off, as on A2 and A3, it sends rows and columns
  // instead: accepted, our reading.
  void check_weight(const char* name, Matrix_ w, int64_t rows, int64_t columns, bool int8) const {
    require(w.defined() && w.dim() == 2, name, show(w), "a matrix");
    require(w.dtype == (int8 ? kI8 : kBF16), name, show(w),
            int8 ? "INT8 in this mode" : "BFLOAT16 in this mode (other weights are not emulated)");
    require(w.size(0) == rows && w.size(1) == columns, name, show(w),
            "the shape that tokenX, weightUk and the norms give");
  }

  void check() const {
    const bool all_int8 = weight_mode == 2, int8_up = weight_mode == 1 || all_int8;
    require_generation(kOnA2A3);
    require(weight_mode >= 0 && weight_mode <= 2, "weightQuantMode", text(weight_mode),
            "0, 1 or 2 (FLOAT8 and HIFLOAT8 are not emulated)");
    require(cache_mode_quant >= 0 && cache_mode_quant <= 2, "kvCacheQuantMode",
            text(cache_mode_quant), "0, 1 or 2 (3 is not emulated)");
    require((cache_mode_quant == 1) == (query_mode == 1) && (cache_mode_quant != 1 || all_int8),
            "queryQuantMode", text(query_mode), "1 with kvCacheQuantMode 1 and weightQuantMode 2");
    require(cache_mode_quant != 2 || weight_mode == 1, "kvCacheQuantMode", "2",
            "2 with weightQuantMode 1");
    require(joined == 0 && joined_scales == 0, "ckvkrRepoMode", text(joined),
            "0 (1 is not emulated)");
    require(cache_mode == "PA_BSND", "cacheMode", cache_mode,
            "PA_BSND (other caches are not emulated)");
    const Types halves = {kBF16}, rows = {all_int8 ? kI8 : kBF16};
    const Types cache = {cache_mode_quant ? kI8 : kBF16},
                rope_cache = {cache_mode_quant == 2 ? kI8 : kBF16};
    check_table({{"tokenX", x, true, rows, 2, 3, kDocument},
                 {"weightUk", uk, true, halves, 3, 3, kDocument},
                 {"rmsnormGammaCq", gamma_cq, true, halves, 1, 1, kDocument},
                 {"rmsnormGammaCkv", gamma_ckv, true, halves, 1, 1, kDocument},
                 {"ropeSin", sin, true, halves, 2, 3, kDocument},
                 {"ropeCos", cos, true, halves, 2, 3, kDocument},
                 {"cacheIndex", index, true, {at::kLong}, 1, 2, kDocument},
                 {"kvCacheRef", *kv_cache, true, cache, 4, 4, kDocument},
                 {"krCacheRef", *kr_cache, true, rope_cache, 4, 4, kDocument},
                 {"dequantScaleX", scale_x, all_int8, kSingle, 1, 2, kDocument},
                 {"dequantScaleWDq", scale_dq, all_int8, kSingle, 2, 2, kDocument},
                 {"dequantScaleWUqQr", scale_uq_qr, int8_up, kSingle, 2, 2, kDocument},
                 {"dequantScaleWDkvKr", scale_dkv_kr, all_int8, kSingle, 2, 2, kDocument},
                 {"quantScaleCkv", quant_ckv, cache_mode_quant != 0, kSingle, 1, 2, kDocument},
                 {"quantScaleCkr", quant_ckr, cache_mode_quant == 2, kSingle, 2, 2, kDocument},
                 {"smoothScalesCq", smooth_cq, false, kSingle, 2, 2, kDocument},
                 {"queryOut", *query, true, {query_mode ? kI8 : kBF16}, 3, 4, kDocument},
                 {"queryRopeOut", *query_rope, true, halves, 3, 4, kDocument}});
    require(!lengths.defined() && !clip_alpha.defined(), "actualSeqLen", "a value",
            "nothing with these caches");
    check_sizes(all_int8, int8_up);
  }

  void check_sizes(bool all_int8, bool int8_up) const {
    const int64_t heads = uk.size(0), width = uk.size(1), rank = uk.size(2), turn = sin.size(-1);
    require(rank == 512, "weightUk", show(uk), "[N, D, 512]");
    require(width == 128 || width == 192, "weightUk", show(uk), "D of 128 or 192");
    require(heads <= 128 && (heads & (heads - 1)) == 0, "weightUk", show(uk),
            "1, 2, 4, 8, 16, 32, 64 or 128 heads");
    require(turn == 64 && sin.sizes() == cos.sizes() && sin.numel() == tokens() * 64, "ropeSin",
            show(sin), "64 values for each token, as ropeCos");
    require(index.numel() == tokens(), "cacheIndex", show(index), "a place for each token");
    check_weight("weightDq", dq, x.size(-1), gamma_cq.size(0), all_int8);
    check_weight("weightUqQr", uq_qr, gamma_cq.size(0), heads * (width + turn), int8_up);
    check_weight("weightDkvKr", dkv_kr, x.size(-1), rank + turn, all_int8);
    require(gamma_ckv.size(0) == rank, "rmsnormGammaCkv", show(gamma_ckv), "[512]");
    require(kv_cache->size(2) == 1 && kv_cache->size(3) == rank, "kvCacheRef", show(*kv_cache),
            "[blocks, block size, 1, 512]");
    require(kr_cache->size(0) == kv_cache->size(0) && kr_cache->size(1) == kv_cache->size(1) &&
                kr_cache->size(2) == 1 && kr_cache->size(3) == turn,
            "krCacheRef", show(*kr_cache), "the blocks of kvCacheRef, with 64 values in a row");
    require(query->numel() == tokens() * heads * rank && query->size(-1) == rank, "queryOut",
            show(*query), "the tokens of tokenX, N heads, 512");
    require(query_rope->numel() == tokens() * heads * turn && query_rope->size(-1) == turn,
            "queryRopeOut", show(*query_rope), "the tokens of tokenX, N heads, 64");
  }

  // V2 says by its dtypes what V3 says by its modes.
  MlaProlog by_dtypes() const {
    MlaProlog call = *this;
    const bool all_int8 = x.defined() && x.scalar_type() == kI8;
    call.weight_mode = all_int8 ? 2 : uq_qr.dtype == kI8 ? 1 : 0;
    const bool int8_cache = kv_cache && kv_cache->scalar_type() == kI8;
    call.cache_mode_quant = !int8_cache ? 0 : all_int8 ? 1 : 2;
    call.query_mode = call.cache_mode_quant == 1;
    return call;
  }
  void check_v2() const { by_dtypes().check(); }
  void run_v2() const { by_dtypes().run(); }

  void run() const {
    if (!tokens()) return;
    const Prolog prolog{x,
                        dq.read(),
                        uq_qr.read(),
                        uk,
                        dkv_kr.read(),
                        gamma_cq,
                        gamma_ckv,
                        sin,
                        cos,
                        scale_x,
                        scale_dq,
                        scale_uq_qr,
                        scale_dkv_kr,
                        quant_ckv,
                        quant_ckr,
                        smooth_cq,
                        epsilon_cq,
                        epsilon_ckv,
                        qc_scale,
                        kc_scale,
                        query_mode == 1};
    const Prolog::Result result = prolog.run();
    store(result, index, query, query_rope, kv_cache, kr_cache);
    if (query_scale && result.query_scale.defined())
      query_scale = result.query_scale.reshape(query_scale->sizes());
    if (norm) norm = result.norm.reshape(norm->sizes());
    if (norm_scale && result.norm_scale.defined())
      norm_scale = result.norm_scale.reshape(norm_scale->sizes());
  }
};

}  // namespace

NAMED(aclnnMlaPrologV2WeightNz, MlaProlog, v2, check_v2, run_v2)
NAMED(aclnnMlaPrologV3WeightNz, MlaProlog, v3, check, run)

// The caches come as inputs; the results are whole caches, which may be the same memory.
GRAPH_OP(MlaProlog, [](const GraphArguments& a) {
  if (a.attribute<std::string>("cache_mode") != "PA_BSND")
    refuse("cache_mode", a.attribute<std::string>("cache_mode"),
           "PA_BSND (other caches are not emulated)");
  const Prolog prolog{a.in(0),
                      a.in(1),
                      a.in(2),
                      a.in(3),
                      a.in(4),
                      a.in(5),
                      a.in(6),
                      a.in(7),
                      a.in(8),
                      a.optional(12),
                      a.optional(13),
                      a.optional(14),
                      a.optional(15),
                      a.optional(16),
                      a.optional(17),
                      a.optional(18),
                      a.attribute<double>("rmsnorm_epsilon_cq"),
                      a.attribute<double>("rmsnorm_epsilon_ckv")};
  for (const size_t i : {size_t{2}, size_t{3}})
    if (a.out(i)->data_ptr() != a.in(i + 8).data_ptr()) a.out(i) = a.in(i + 8);
  store(prolog.run(), a.in(9), a.out(0), a.out(1), a.out(2), a.out(3));
})

}  // namespace softnpu
