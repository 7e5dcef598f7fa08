// Mixture of experts and hyper-connection operators. Tables: argument, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/div.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

const std::vector<at::ScalarType> kFloats = {kF16, kBF16, kF32};
const std::vector<at::ScalarType> kHalves = {kF16, kBF16};
constexpr Source kDocument = Source::kDocument, kReading = Source::kReading;

std::string text(int64_t value) { return std::to_string(value); }

// npu_moe_gating_top_k: 2-D, at most 2048 experts, 1 <= k <= experts / groups * k_group, bias 1-D in x's dtype, renorm
// 0.
constexpr auto check_gating = [](In x, In bias, int64_t k, int64_t k_group, int64_t groups, int64_t select,
                                 int64_t renorm, int64_t norm, bool, double, double, Out, Out, Out) {
  check_table({{"x", true, kFloats, 2, 2, kDocument}, {"bias", false, kFloats, 1, 1, kDocument}}, {x, bias});
  const int64_t experts = x.size(1);
  require(experts <= 2048, "x", show(x), "at most 2048 experts");
  require(groups > 0 && experts % groups == 0 && (groups == 1 || experts / groups > 2), "group_count", text(groups),
          "a divisor of the experts that leaves more than 2 in a group");
  require((experts / groups + 31) / 32 * 32 * groups <= 2048, "group_count", text(groups),
          "groups padded to 32 experts that sum to at most 2048");
  require(k_group >= 1 && k_group <= groups, "k_group", text(k_group), "1 to group_count");
  require(k >= 1 && k <= experts / groups * k_group, "k", text(k), "1 to the experts of the chosen groups");
  require(select == 0 || select == 1, "group_select_mode", text(select), "0 or 1");
  require(renorm == 0, "renorm", text(renorm), "0");
  require(norm == 0 || norm == 1, "norm_type", text(norm), "0 (softmax) or 1 (sigmoid)");
  if (bias.defined())
    require(bias.size(0) == experts && bias.scalar_type() == x.scalar_type(), "bias", show(bias),
            "one value for each expert in x's dtype");
};

at::Tensor only_best_groups(In scores, int64_t groups, int64_t keep, int64_t select) {
  if (groups == 1) return scores;
  const at::Tensor grouped = scores.view({scores.size(0), groups, -1});
  const at::Tensor value = select == 0 ? at::amax(grouped, {-1}) : std::get<0>(at::topk(grouped, 2)).sum(-1);
  const at::Tensor best = std::get<1>(at::sort(value, std::optional(true), -1, true)).slice(1, 0, keep);
  const at::Tensor kept = at::zeros(value.sizes(), at::kBool).scatter_(1, best, true);
  return grouped.masked_fill(kept.logical_not().unsqueeze(-1), -std::numeric_limits<double>::infinity())
      .view(scores.sizes());
}

// npu_moe_token_permute: bf16 by the document; fp16 and fp32 are accepted too (our reading of CANN's own page).
constexpr auto check_permute = [](In tokens, In indices, int64_t, bool padded, Out, Out) {
  check_table({{"tokens", true, kFloats, 2, 2, kReading}, {"indices", true, {at::kLong, at::kInt}, 1, 2, kReading}},
              {tokens, indices});
  require(!padded, "padded_mode", "true", "false");
  require(indices.size(0) == tokens.size(0), "indices", show(indices), "a row for each token");
  require(indices.dim() == 1 || indices.size(1) <= 512, "indices", show(indices), "at most 512 experts for a token");
  require(indices.numel() < 16777215, "indices", show(indices), "fewer than 16777215 values");
};

constexpr auto check_unpermute = [](In rows, In sorted, In probs, bool padded, OptionalInts, Out) {
  check_table({{"permuted_tokens", true, kFloats, 2, 2, kReading},
               {"sorted_indices", true, {at::kInt}, 1, 1, kReading},
               {"probs", false, kFloats, 2, 2, kReading}},
              {rows, sorted, probs});
  require(!padded, "padded_mode", "true", "false");
  if (probs.defined()) require(probs.numel() == sorted.numel(), "probs", show(probs), "a value for each sorted index");
};

// npu_moe_finalize_routing: drop_pad_mode 0 (column order) and 2 (row order); 1 and 3 (padded) are not emulated.
constexpr auto check_finalize = [](In rows, In to_row, In skip1, In skip2, In bias, In scales, In experts, int64_t mode,
                                   Out o) {
  check_table({{"expanded_permuted_rows", true, kFloats, 2, 2, kDocument},
               {"expanded_src_to_dst_row", true, {at::kInt}, 1, 1, kDocument},
               {"skip1", false, kFloats, 2, 2, kDocument},
               {"skip2", false, kFloats, 2, 2, kDocument},
               {"bias", false, kFloats, 2, 2, kDocument},
               {"scales", false, kFloats, 2, 2, kDocument},
               {"expert_for_source_row", false, {at::kInt}, 2, 2, kDocument}},
              {rows, to_row, skip1, skip2, bias, scales, experts});
  require(mode == 0 || mode == 2, "drop_pad_mode", text(mode), "0 or 2 (1 and 3 are not emulated)");
  require(!skip2.defined() || skip1.defined(), "skip2", show(skip2), "skip1 beside it");
  require(!bias.defined() || experts.defined(), "expert_for_source_row", "nothing", "the experts, as a bias is given");
  for (const auto& skip : {skip1, skip2})
    if (skip.defined())
      require(skip.sizes() == o->sizes() && skip.scalar_type() == rows.scalar_type(), "skip1", show(skip),
              "shape and dtype of the output");
  if (scales.defined()) require(scales.numel() == to_row.numel(), "scales", show(scales), "[rows, k]");
};

bool is_streams(int64_t n) { return n == 4 || n == 6 || n == 8; }

// npu_mhc_sinkhorn, _pre, _post: Ascend 950 only; n is 4, 6 or 8; parameters fp32.
constexpr auto check_sinkhorn = [](In x, float, int64_t iterations, Out, Out norm, Out) {
  require_generation(kOnA5);
  check_table({{"x", true, {kF32}, 3, 4, kDocument}}, {x});
  require(is_streams(x.size(-1)) && x.size(-2) == x.size(-1), "x", show(x), "[..., n, n] with n 4, 6 or 8");
  require(x.numel() > 0, "x", show(x), "no empty tensor");
  require(iterations >= 1 && iterations <= 100, "num_iters", text(iterations), "1 to 100");
  require(!norm || norm->numel() == 0, "out_flag", "1", "0 (the layout of the intermediate results is not emulated)");
};

constexpr auto check_mhc_post = [](In x, In res, In out, In post, Out) {
  require_generation(kOnA5);
  check_table({{"x", true, kHalves, 3, 4, kDocument},
               {"h_res", false, {kF32}, 3, 4, kDocument},
               {"h_out", true, kHalves, 2, 3, kDocument},
               {"h_post", true, {kF32}, 2, 3, kDocument}},
              {x, res, out, post});
  const int64_t n = x.size(-2);
  require(is_streams(n), "x", show(x), "4, 6 or 8 streams");
  require(out.dim() == x.dim() - 1 && out.size(-1) == x.size(-1) && out.scalar_type() == x.scalar_type(), "h_out",
          show(out), "x without its streams");
  require(post.dim() == x.dim() - 1 && post.size(-1) == n, "h_post", show(post), "one value for each stream");
  if (res.defined())
    require(res.dim() == x.dim() && res.size(-1) == n && res.size(-2) == n, "h_res", show(res), "[..., n, n]");
};

constexpr auto check_mhc_pre = [](In x, In phi, In alpha, In bias, In gamma, double, double, Out, Out, Out, Out, Out,
                                  Out) {
  require_generation(kOnA5);
  check_table({{"x", true, kHalves, 3, 4, kDocument},
               {"phi", true, {kF32}, 2, 2, kDocument},
               {"alpha", true, {kF32}, 1, 1, kDocument},
               {"bias", true, {kF32}, 1, 1, kDocument},
               {"gamma", false, {kF32}, 2, 2, kDocument}},
              {x, phi, alpha, bias, gamma});
  const int64_t n = x.size(-2), width = x.size(-1), rows = n * n + 2 * n;
  require(is_streams(n), "x", show(x), "4, 6 or 8 streams");
  require(phi.size(0) == rows && phi.size(1) == n * width, "phi", show(phi), "[n*n + 2n, n*D]");
  require(alpha.size(0) == 3, "alpha", show(alpha), "3 values");
  require(bias.size(0) == rows, "bias", show(bias), "n*n + 2n values");
  if (gamma.defined()) require(gamma.size(0) == n && gamma.size(1) == width, "gamma", show(gamma), "[n, D]");
};

at::Tensor sinkhorn(In x, double eps, int64_t iterations) {
  at::Tensor m = at::softmax(x, -1).add(eps);
  for (int64_t i = 0; i < iterations; ++i) {
    if (i) m = m.div(m.sum(-1, true).add(eps));
    m = m.div(m.sum(-2, true).add(eps));
  }
  return m;
}

}  // namespace

CHECKED(aclnnMoeGatingTopK, check_gating,
        [](In x, In bias, int64_t k, int64_t k_group, int64_t groups, int64_t select, int64_t, int64_t norm,
           bool out_flag, double factor, double eps, Out y, Out ids, Out normed) {
          const at::Tensor wide = x.to(kF32);
          const at::Tensor p = norm == 1 ? at::sigmoid(wide) : at::softmax(wide, -1);
          const at::Tensor scores =
              only_best_groups(bias.defined() ? p.add(bias.to(kF32)) : p, groups, k_group, select);
          const at::Tensor chosen =
              std::get<1>(at::sort(scores, std::optional(true), -1, true)).slice(1, 0, k);  // ties: smaller id first
          const at::Tensor weights = p.gather(1, chosen);
          y = (norm == 1 ? weights.div(weights.sum(-1, true).add(eps)) : weights).mul(factor);
          ids = chosen;
          if (out_flag) normed = p;
        })
CHECKED(aclnnMoeTokenPermute, check_permute, [](In tokens, In indices, int64_t rows, bool, Out permuted, Out sorted) {
  const at::Tensor order = at::argsort(indices.reshape({-1}), true, 0, false);
  const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
  sorted = at::argsort(order, true, 0, false);
  permuted = tokens.index_select(0, at::div(order, k, "floor").slice(0, 0, rows));
})
CHECKED(aclnnMoeTokenUnpermute, check_unpermute, [](In rows, In sorted, In probs, bool, OptionalInts, Out o) {
  const int64_t k = probs.defined() ? probs.size(1) : 1;
  const at::Tensor back = rows.index_select(0, sorted.to(at::kLong)).to(kF32).view({-1, k, rows.size(1)});
  o = (probs.defined() ? back.mul(probs.to(kF32).unsqueeze(-1)) : back).sum(1);
})
CHECKED(aclnnMoeFinalizeRoutingV2, check_finalize,
        [](In rows, In to_row, In skip1, In skip2, In bias, In scales, In experts, int64_t mode, Out o) {
          const int64_t count = o->size(0), k = to_row.numel() / std::max<int64_t>(count, 1);
          const at::Tensor order = mode == 0 ? to_row.view({k, count}).t() : to_row.view({count, k});
          at::Tensor picked = rows.index_select(0, order.reshape({-1}).to(at::kLong)).to(kF32).view({count, k, -1});
          if (bias.defined())
            picked =
                picked.add(bias.to(kF32).index_select(0, experts.reshape({-1}).to(at::kLong)).view(picked.sizes()));
          if (scales.defined()) picked = picked.mul(scales.to(kF32).unsqueeze(-1));
          at::Tensor sum = picked.sum(1);
          if (skip1.defined()) sum = sum.add(skip1.to(kF32));
          if (skip2.defined()) sum = sum.add(skip2.to(kF32));
          o = sum;
        })
CHECKED(aclnnMhcSinkhorn, check_sinkhorn,
        [](In x, float eps, int64_t iterations, Out o, Out, Out) { o = sinkhorn(x, eps, iterations); })
CHECKED(aclnnMhcPost, check_mhc_post, [](In x, In res, In out, In post, Out o) {
  const at::Tensor wide = x.to(kF32);
  const at::Tensor mixed = res.defined() ? at::matmul(res.transpose(-1, -2), wide) : wide;
  o = mixed.add(out.to(kF32).unsqueeze(-2).mul(post.unsqueeze(-1)));
})
CHECKED(aclnnMhcPre, check_mhc_pre,
        [](In x, In phi, In alpha, In bias, In gamma, double norm_eps, double hc_eps, Out in, Out post, Out res,
           Out inverse, Out mix, Out pre) {
          const int64_t n = x.size(-2);
          const at::Tensor wide = x.to(kF32);
          const at::Tensor flat = wide.flatten(-2), scaled = gamma.defined() ? wide.mul(gamma).flatten(-2) : flat;
          const at::Tensor r = at::rsqrt(at::mean(flat.square(), {-1}, true).add(norm_eps));
          const at::Tensor product = at::matmul(scaled, phi.t());
          const auto gates = product.mul(r).split_with_sizes({n, n, n * n}, -1);
          const auto shifts = bias.split_with_sizes({n, n, n * n}, 0);
          const at::Tensor h_pre = at::sigmoid(gates[0].mul(alpha[0]).add(shifts[0])).add(hc_eps);
          post = at::sigmoid(gates[1].mul(alpha[1]).add(shifts[1])).mul(2);
          res = gates[2].mul(alpha[2]).add(shifts[2]).unflatten(-1, {n, n});
          in = wide.mul(h_pre.unsqueeze(-1)).sum(-2);
          if (inverse && inverse->numel()) inverse = r.squeeze(-1);
          if (mix && mix->numel()) mix = product;
          if (pre && pre->numel()) pre = h_pre;
        })

}  // namespace softnpu
