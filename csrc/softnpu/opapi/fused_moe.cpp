// Mixture-of-experts operators. Tables: argument, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/div.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

// The pages of MoeGatingTopK and MoeGatingTopKV2.
struct Gating {
  int64_t k, k_group, groups, select, renorm, norm;
  bool out_flag;
  double factor, eps;
};

void check_groups(const Gating& g, In x) {
  const int64_t experts = x.size(1);
  require(x.numel() > 0, "x", show(x), "no empty tensor");
  require(experts <= 2048, "x", show(x), "at most 2048 experts");
  require(g.select == 0 || g.select == 1, "group_select_mode", text(g.select), "0 or 1");
  require(g.groups > 0 && experts % g.groups == 0 && experts / g.groups > g.select, "group_count", text(g.groups),
          "a divisor of the experts that leaves more than group_select_mode in a group");
  require((experts / g.groups + 31) / 32 * 32 * g.groups <= 2048, "group_count", text(g.groups),
          "groups padded to 32 experts that sum to at most 2048");
  require(g.k_group >= 1 && g.k_group <= g.groups, "k_group", text(g.k_group), "1 to group_count");
  require(g.k >= 1 && g.k <= experts / g.groups * g.k_group, "k", text(g.k), "1 to the experts of the chosen groups");
}

// The page of CANN 8.5.0 knows renorm 0 only, that of 9.0.0 also 1, that of 9.1.0 norm_type 2 (on Ascend 950).
void check_modes(const Gating& g) {
  require(g.renorm == 0 || (g.renorm == 1 && cann_from(9, 0)), "renorm", text(g.renorm), "0 (from CANN 9.0.0 also 1)");
  const bool root = on_a5() && cann_from(9, 1);
  require(g.norm >= 0 && g.norm <= (root ? 2 : 1), "norm_type", text(g.norm),
          "0 (softmax) or 1 (sigmoid); on Ascend 950 from CANN 9.1.0 also 2 (square root of softplus)");
}

// mirror-cann/ops-transformer moe/moe_gating_top_k/docs/aclnnMoeGatingTopK.md; the dtype of bias by torch_npu's
// documentation.
void check_gating(const Gating& g, In x, In bias) {
  check_table({{"x", true, kFloats, 2, 2, kDocument}, {"bias", false, kFloats, 1, 1, kDocument}}, {x, bias},
              kTilingRefuses);
  if (bias.defined()) require(bias.scalar_type() == x.scalar_type(), "bias", show(bias), "the dtype of x");
  refusing_with(kTilingRefuses, [&] {
    check_groups(g, x);
    check_modes(g);
    if (bias.defined()) require(bias.size(0) == x.size(1), "bias", show(bias), "one value for each expert");
  });
}

// mirror-cann/ops-transformer moe/moe_gating_top_k/docs/aclnnMoeGatingTopKV2.md: newer than CANN 9.1.0, taken as 9.2.0.
void check_hash(const Gating& g, In x, In bias, In input_ids, In table) {
  if (!cann_from(9, 2)) throw Fault(kNnParameter, "input_ids and tid2eid do not exist before CANN 9.2.0");
  check_gating(g, x, bias);
  const Types ints = {at::kInt, at::kLong};
  check_table({{"input_ids", false, ints, 1, 1, kDocument}, {"tid2eid", false, ints, 2, 2, kDocument}},
              {input_ids, table}, kTilingRefuses);
  if (!input_ids.defined() || !table.defined()) return;
  refusing_with(kTilingRefuses, [&] {
    require(input_ids.size(0) == x.size(0), "input_ids", show(input_ids), "a value for each row of x");
    require(table.size(1) == g.k, "tid2eid", show(table), "k experts in each row");
    require(g.k <= 64, "k", text(g.k), "at most 64 with tid2eid");
    require(g.k_group == g.groups || g.groups == x.size(1), "k_group", text(g.k_group),
            "group_count, or a group_count of all experts, with tid2eid");
  });
}

at::Tensor only_best_groups(In scores, int64_t groups, int64_t keep, int64_t select) {
  if (groups == 1) return scores;
  const at::Tensor grouped = scores.view({scores.size(0), groups, -1});
  const at::Tensor value = select == 0 ? at::amax(grouped, {-1}) : std::get<0>(at::topk(grouped, 2)).sum(-1);
  const at::Tensor best = std::get<1>(at::sort(value, std::optional(true), -1, true)).slice(1, 0, keep);
  const at::Tensor kept = at::zeros(value.sizes(), at::kBool).scatter_(1, best, true);
  return grouped.masked_fill(kept.logical_not().unsqueeze(-1), -std::numeric_limits<double>::infinity())
      .view(scores.sizes());
}

at::Tensor best_experts(const Gating& g, In p, In bias) {
  const at::Tensor scores = only_best_groups(bias.defined() ? p.add(bias.to(kF32)) : p, g.groups, g.k_group, g.select);
  return std::get<1>(at::sort(scores, std::optional(true), -1, true))
      .slice(1, 0, g.k);  // ties: smaller id, our reading
}

// The pages divide by the sum of all experts, or (hash mode) by that of the chosen ones: always the second, as
// torch_npu's documentation says.
void gate(const Gating& g, In x, In bias, In input_ids, In table, Out y, Out ids, Out normed) {
  const at::Tensor wide = x.to(kF32);
  const at::Tensor p = g.norm == 0   ? at::softmax(wide, -1)
                       : g.norm == 1 ? at::sigmoid(wide)
                                     : at::softplus(wide).sqrt();
  const bool by_table = input_ids.defined() && table.defined();
  if (by_table) expect_values(input_ids, 0, table.size(0), "input_ids");
  const at::Tensor chosen =
      by_table ? table.to(at::kLong).index_select(0, input_ids.to(at::kLong)) : best_experts(g, p, bias);
  if (by_table) expect_values(chosen, 0, x.size(1), "tid2eid");
  const at::Tensor weights = p.gather(1, chosen);
  const bool sum_to_one = g.norm != 0 || g.renorm == 1;
  y = (sum_to_one ? weights.div(weights.sum(-1, true).add(g.eps)) : weights).mul(g.factor);
  ids = chosen;
  if (g.out_flag) normed = p;
}

constexpr auto check_gating_v1 = [](In x, In bias, int64_t k, int64_t k_group, int64_t groups, int64_t select,
                                    int64_t renorm, int64_t norm, bool out_flag, double factor, double eps, Out, Out,
                                    Out) {
  check_gating({k, k_group, groups, select, renorm, norm, out_flag, factor, eps}, x, bias);
};
constexpr auto check_gating_v2 = [](In x, In bias, In input_ids, In table, int64_t k, int64_t k_group, int64_t groups,
                                    int64_t select, int64_t renorm, int64_t norm, bool out_flag, double factor,
                                    double eps, Out, Out, Out) {
  check_hash({k, k_group, groups, select, renorm, norm, out_flag, factor, eps}, x, bias, input_ids, table);
};

int64_t permuted_rows(int64_t all, int64_t wanted) {
  if (wanted == 0) return all;
  return wanted > 0 ? std::min(all, wanted) : std::max<int64_t>(all + wanted, 0);
}

// hicann/ops-transformer moe/moe_token_permute/docs/aclnnMoeTokenPermute.md. int8: newer than CANN 9.1.0, taken as
// 9.2.0 (an older state of that page limits the count of indices to 10240, the newest one their values). 512 experts
// for a token: the page of 8.5.0.
constexpr auto check_permute = [](In tokens, In indices, int64_t wanted, bool padded, Out permuted, Out sorted) {
  Types types = kFloats;
  if (on_a5() && cann_from(9, 2)) types.push_back(at::kChar);
  const int64_t highest = tokens.defined() && tokens.scalar_type() == at::kChar ? 2 : 8;
  check_table({{"tokens", true, types, 2, highest, kDocument},
               {"indices", true, {at::kLong, at::kInt}, 1, 2, kDocument},
               {"permuted_tokens", true, types, 2, 8, kDocument},
               {"sorted_indices", true, {at::kInt}, 1, 1, kDocument}},
              {tokens, indices, *permuted, *sorted}, kTilingRefuses);
  refusing_with(kTilingRefuses, [&] {
    require(!padded, "padded_mode", "true", "false");
    require(indices.size(0) == tokens.size(0), "indices", show(indices), "a row for each token");
  });
  require(on_a5() || indices.dim() == 1 || indices.size(1) <= 512, "indices", show(indices),
          "at most 512 experts for a token");
  require(indices.numel() < 16777215, "indices", show(indices), "fewer than 16777215 values");
  require(permuted->size(0) == permuted_rows(indices.numel(), wanted), "permuted_tokens", show(*permuted),
          "a row for each index, or as many as num_out_tokens says");
};

// mirror-cann/ops-transformer moe/moe_token_unpermute/docs/aclnnMoeTokenUnpermute.md. On Ascend 950 the call becomes
// aclnnMoeFinalizeRoutingV2.
constexpr auto check_unpermute = [](In rows, In sorted, In probs, bool padded, OptionalInts, Out) {
  check_table({{"permuted_tokens", true, kFloats, 2, 2, kDocument},
               {"sorted_indices", true, {at::kInt}, 1, 1, kDocument},
               {"probs", false, kFloats, 2, 2, kDocument}},
              {rows, sorted, probs});
  require(!padded, "padded_mode", "true", "false");
  require(rows.size(0) == sorted.numel(), "sorted_indices", show(sorted), "a value for each row of permuted_tokens");
  if (!probs.defined()) return;
  require(probs.numel() == sorted.numel(), "probs", show(probs), "a value for each sorted index");
  require(on_a5() || probs.size(1) <= 512, "probs", show(probs), "at most 512 experts for a token");
};

struct Finalize {
  const at::Tensor &rows, &to_row, &skip1, &skip2, &bias, &scales, &experts;
  int64_t mode;
  bool padded() const { return mode == 1 || mode == 3; }
  int64_t k() const { return scales.defined() ? scales.size(1) : 1; }
};

void check_finalize_dtypes(const Finalize& f) {
  for (const auto& [name, x] : {std::pair("skip1", f.skip1), {"skip2", f.skip2}, {"bias", f.bias}})
    if (x.defined())
      require(x.scalar_type() == f.rows.scalar_type(), name, show(x), "the dtype of expanded_permuted_rows");
  if (!f.scales.defined() || on_a5()) return;
  const bool mixed = f.rows.scalar_type() == kBF16 && f.scales.scalar_type() == kF32;
  require(mixed || f.scales.scalar_type() == f.rows.scalar_type(), "scales", show(f.scales),
          "the dtype of expanded_permuted_rows, or fp32 with bf16");
}

void check_finalize_shapes(const Finalize& f, In o) {
  const int64_t k = f.k(), count = f.to_row.numel() / std::max<int64_t>(k, 1), width = f.rows.size(-1);
  const auto is = [](In x, int64_t height, int64_t wide) {
    return !x.defined() || (x.size(0) == height && x.size(1) == wide);
  };
  require(f.rows.numel() > 0 && f.to_row.numel() > 0, "expanded_permuted_rows", show(f.rows), "no empty tensor");
  require(f.to_row.numel() == count * k, "expanded_src_to_dst_row", show(f.to_row), "rows * k values");
  require(f.padded() || f.rows.size(0) == count * k, "expanded_permuted_rows", show(f.rows), "[rows * k, H]");
  require(is(f.scales, count, k), "scales", show(f.scales), "[rows, k]; without scales k is 1");
  require(is(f.experts, count, k), "expert_for_source_row", show(f.experts), "[rows, k]; without scales k is 1");
  require(o.dim() == 2 && is(o, count, width), "out", show(o), "[rows, H]");
  require(is(f.skip1, count, width), "skip1", show(f.skip1), "the shape of out");
  require(is(f.skip2, count, width), "skip2", show(f.skip2), "the shape of out");
  if (f.bias.defined()) {
    require(f.bias.size(1) == width && (!f.padded() || f.bias.size(0) == f.rows.size(0)), "bias", show(f.bias),
            "[experts, H]");
    require(f.bias.size(0) >= k, "bias", show(f.bias), "at least k experts");
  }
  require(!f.padded() || f.rows.size(0) >= k, "expanded_permuted_rows", show(f.rows), "at least k experts");
}

// mirror-cann/ops-transformer moe/moe_finalize_routing_v2/docs/aclnnMoeFinalizeRoutingV2.md
constexpr auto check_finalize = [](In rows, In to_row, In skip1, In skip2, In bias, In scales, In experts, int64_t mode,
                                   Out o) {
  require(mode >= 0 && mode <= 3, "drop_pad_mode", text(mode), "0 to 3");
  const Finalize f{rows, to_row, skip1, skip2, bias, scales, experts, mode};
  const int64_t rank = f.padded() ? 3 : 2;
  check_table({{"expanded_permuted_rows", true, kFloats, rank, rank, kDocument},
               {"expanded_src_to_dst_row", true, {at::kInt}, 1, 1, kDocument},
               {"skip1", false, kFloats, 2, 2, kDocument},
               {"skip2", false, kFloats, 2, 2, kDocument},
               {"bias", false, kFloats, 2, 2, kDocument},
               {"scales", false, kFloats, 2, 2, kDocument},
               {"expert_for_source_row", false, {at::kInt}, 2, 2, kDocument}},
              {rows, to_row, skip1, skip2, bias, scales, experts});
  require(!skip2.defined() || skip1.defined(), "skip2", show(skip2), "skip1 beside it");
  require(!bias.defined() || experts.defined(), "expert_for_source_row", "nothing", "the experts, as a bias is given");
  check_finalize_dtypes(f);
  refusing_with(kShapeInferenceRefuses, [&] { check_finalize_shapes(f, *o); });
};

// What the experts give for each token and choice: [tokens, k, H]. A dropped choice (-1 in modes 1 and 3) gives
// nothing, not even its bias: our reading.
at::Tensor expert_results(const Finalize& f, int64_t count) {
  const int64_t k = f.k();
  const at::Tensor flat = f.rows.reshape({-1, f.rows.size(-1)});
  const at::Tensor order =
      (f.mode < 2 ? f.to_row.view({k, count}).t() : f.to_row.view({count, k})).reshape({-1}).to(at::kLong);
  expect_values(order, f.padded() ? -1 : 0, flat.size(0), "expanded_src_to_dst_row");
  if (f.bias.defined()) expect_values(f.experts, 0, f.bias.size(0), "expert_for_source_row");
  const at::Tensor dropped = order.eq(-1);
  const at::Tensor index = f.padded() ? order.masked_fill(dropped, 0) : order;
  at::Tensor picked = flat.index_select(0, index).to(kF32);
  if (f.bias.defined()) picked = picked.add(f.bias.to(kF32).index_select(0, f.experts.reshape({-1}).to(at::kLong)));
  return picked.masked_fill(dropped.unsqueeze(-1), 0).view({count, k, -1});
}

}  // namespace

CHECKED(aclnnMoeGatingTopK, check_gating_v1,
        [](In x, In bias, int64_t k, int64_t k_group, int64_t groups, int64_t select, int64_t renorm, int64_t norm,
           bool out_flag, double factor, double eps, Out y, Out ids, Out normed) {
          gate({k, k_group, groups, select, renorm, norm, out_flag, factor, eps}, x, bias, at::Tensor(), at::Tensor(),
               y, ids, normed);
        })
CHECKED(aclnnMoeGatingTopKV2, check_gating_v2,
        [](In x, In bias, In input_ids, In table, int64_t k, int64_t k_group, int64_t groups, int64_t select,
           int64_t renorm, int64_t norm, bool out_flag, double factor, double eps, Out y, Out ids, Out normed) {
          gate({k, k_group, groups, select, renorm, norm, out_flag, factor, eps}, x, bias, input_ids, table, y, ids,
               normed);
        })
CHECKED(aclnnMoeTokenPermute, check_permute, [](In tokens, In indices, int64_t, bool, Out permuted, Out sorted) {
  expect_values(indices, 0, tokens.scalar_type() == at::kChar ? 10240 : 16777215, "indices");
  const at::Tensor order = at::argsort(indices.reshape({-1}), true, 0, false);
  const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
  sorted = at::argsort(order, true, 0, false);
  const at::Tensor from = at::div(order, k, "floor").slice(0, 0, permuted->size(0));
  permuted = tokens.index_select(0, from).reshape(permuted->sizes());
})
CHECKED(aclnnMoeTokenUnpermute, check_unpermute, [](In rows, In sorted, In probs, bool, OptionalInts, Out o) {
  const int64_t k = probs.defined() ? probs.size(1) : 1;
  expect_values(sorted, 0, rows.size(0), "sorted_indices");
  const at::Tensor back = rows.index_select(0, sorted.to(at::kLong))
                              .to(kF32)
                              .view({probs.defined() ? probs.size(0) : rows.size(0), k, rows.size(1)});
  o = (probs.defined() ? back.mul(probs.to(kF32).unsqueeze(-1)) : back).sum(1);
})
CHECKED(aclnnMoeFinalizeRoutingV2, check_finalize,
        [](In rows, In to_row, In skip1, In skip2, In bias, In scales, In experts, int64_t mode, Out o) {
          const Finalize f{rows, to_row, skip1, skip2, bias, scales, experts, mode};
          at::Tensor picked = expert_results(f, o->size(0));
          if (scales.defined()) picked = picked.mul(scales.to(kF32).unsqueeze(-1));
          at::Tensor sum = picked.sum(1);
          if (skip1.defined()) sum = sum.add(skip1.to(kF32));
          if (skip2.defined()) sum = sum.add(skip2.to(kF32));
          o = sum;
        })

}  // namespace softnpu
