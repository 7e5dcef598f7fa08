// Mixture-of-experts operators. Tables: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/argsort.h>
#include <ATen/ops/div.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "fused_moe_gating.h"

namespace softnpu {
namespace {

struct BuiltinGating : Gating {
  void check_groups() const {
    const int64_t experts = x.size(1), group = group_count > 0 ? experts / group_count : 0;
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(experts <= 2048, "x", show(x), "at most 2048 experts");
    require(group_select_mode == 0 || group_select_mode == 1, "group_select_mode",
            text(group_select_mode), "0 or 1");
    require(group_count > 0 && experts % group_count == 0 && group > group_select_mode,
            "group_count", text(group_count),
            "a divisor of the experts that leaves more than group_select_mode in a group");
    require((group + 31) / 32 * 32 * group_count <= 2048, "group_count", text(group_count),
            "groups padded to 32 experts that sum to at most 2048");
    require(k_group >= 1 && k_group <= group_count, "k_group", text(k_group), "1 to group_count");
    require(k >= 1 && k <= group * k_group, "k", text(k), "1 to the experts of the chosen groups");
  }

  // The page of CANN 8.5.0 knows renorm 0 only, that of 9.0.0 also 1, that of 9.1.0 norm_type 2 (on
  // Ascend 950).
  void check_modes() const {
    require(renorm == 0 || (renorm == 1 && cann_from(9, 0)), "renorm", text(renorm),
            "0 (from CANN 9.0.0 also 1)");
    const bool root = on_a5() && cann_from(9, 1);
    require(norm_type >= 0 && norm_type <= (root ? 2 : 1), "norm_type", text(norm_type),
            "0 (softmax) or 1 (sigmoid); on Ascend 950 from CANN 9.1.0 also 2 (square root of "
            "softplus)");
  }

  // mirror-cann/ops-transformer moe/moe_gating_top_k/docs/aclnnMoeGatingTopK.md; the dtype of bias
  // by torch_npu's documentation.
  void check() const {
    check_table(
        {{"x", x, true, kFloats, 2, 2, kDocument}, {"bias", bias, false, kFloats, 1, 1, kDocument}},
        kTilingRefuses);
    if (bias.defined())
      require(bias.scalar_type() == x.scalar_type(), "bias", show(bias), "the dtype of x");
    refusing_with(kTilingRefuses, [&] {
      check_groups();
      check_modes();
      if (bias.defined())
        require(bias.size(0) == x.size(1), "bias", show(bias), "one value for each expert");
    });
  }

  // mirror-cann/ops-transformer moe/moe_gating_top_k/docs/aclnnMoeGatingTopKV2.md: of CANN 9.1's
  // family.
  void check_hash() const {
    if (!cann_from(9, 1))
      throw Fault(kNnParameter, "input_ids and tid2eid do not exist before CANN 9.1.0");
    check();
    const Types ints = {at::kInt, at::kLong};
    check_table({{"input_ids", input_ids, false, ints, 1, 1, kDocument},
                 {"tid2eid", tid2eid, false, ints, 2, 2, kDocument}},
                kTilingRefuses);
    if (!input_ids.defined() || !tid2eid.defined()) return;
    refusing_with(kTilingRefuses, [&] {
      require(input_ids.size(0) == x.size(0), "input_ids", show(input_ids),
              "a value for each row of x");
      require(tid2eid.size(1) == k, "tid2eid", show(tid2eid), "k experts in each row");
      require(k <= 64, "k", text(k), "at most 64 with tid2eid");
      require(k_group == group_count || group_count == x.size(1), "k_group", text(k_group),
              "group_count, or a group_count of all experts, with tid2eid");
    });
  }
};

int64_t permuted_rows(int64_t all, int64_t wanted) {
  if (wanted == 0) return all;
  return wanted > 0 ? std::min(all, wanted) : std::max<int64_t>(all + wanted, 0);
}

// hicann/ops-transformer moe/moe_token_permute/docs/aclnnMoeTokenPermute.md. int8: newer than
// CANN 9.1.0, taken as 9.2.0 (an older state of that page limits the count of indices to 10240, the
// newest one their values). 512 experts for a token: the page of 8.5.0.
struct Permute {
  at::Tensor tokens, indices;
  int64_t num_out_tokens;
  bool padded_mode;
  Out permuted_tokens, sorted_indices;
  FIELDS(all, tokens, indices, num_out_tokens, padded_mode, permuted_tokens, sorted_indices)

  void check() const {
    Types types = kFloats;
    if (on_a5() && cann_from(9, 2)) types.push_back(at::kChar);
    const int64_t highest = tokens.defined() && tokens.scalar_type() == at::kChar ? 2 : 8;
    check_table({{"tokens", tokens, true, types, 2, highest, kDocument},
                 {"indices", indices, true, {at::kLong, at::kInt}, 1, 2, kDocument},
                 {"permuted_tokens", *permuted_tokens, true, types, 2, 8, kDocument},
                 {"sorted_indices", *sorted_indices, true, {at::kInt}, 1, 1, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [&] {
      require(!padded_mode, "padded_mode", "true", "false");
      require(indices.size(0) == tokens.size(0), "indices", show(indices), "a row for each token");
    });
    require(on_a5() || indices.dim() == 1 || indices.size(1) <= 512, "indices", show(indices),
            "at most 512 experts for a token");
    require(indices.numel() < 16777215, "indices", show(indices), "fewer than 16777215 values");
    require(permuted_tokens->size(0) == permuted_rows(indices.numel(), num_out_tokens),
            "permuted_tokens", show(*permuted_tokens),
            "a row for each index, or as many as num_out_tokens says");
  }

  void run() const {
    expect_values(indices, 0, tokens.scalar_type() == at::kChar ? 10240 : 16777215, "indices");
    const at::Tensor order = at::argsort(indices.reshape({-1}), true, 0, false);
    const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
    sorted_indices = at::argsort(order, true, 0, false);
    const at::Tensor from = at::div(order, k, "floor").slice(0, 0, permuted_tokens->size(0));
    permuted_tokens = tokens.index_select(0, from).reshape(permuted_tokens->sizes());
  }
};

// mirror-cann/ops-transformer moe/moe_token_unpermute/docs/aclnnMoeTokenUnpermute.md. On Ascend 950
// the call becomes aclnnMoeFinalizeRoutingV2.
struct Unpermute {
  at::Tensor permuted_tokens, sorted_indices, probs;
  bool padded_mode;
  std::optional<std::vector<int64_t>> restore_shape;
  Out out;
  FIELDS(all, permuted_tokens, sorted_indices, probs, padded_mode, restore_shape, out)

  void check() const {
    check_table({{"permuted_tokens", permuted_tokens, true, kFloats, 2, 2, kDocument},
                 {"sorted_indices", sorted_indices, true, {at::kInt}, 1, 1, kDocument},
                 {"probs", probs, false, kFloats, 2, 2, kDocument}});
    require(!padded_mode, "padded_mode", "true", "false");
    require(permuted_tokens.size(0) == sorted_indices.numel(), "sorted_indices",
            show(sorted_indices), "a value for each row of permuted_tokens");
    if (!probs.defined()) return;
    require(probs.numel() == sorted_indices.numel(), "probs", show(probs),
            "a value for each sorted index");
    require(on_a5() || probs.size(1) <= 512, "probs", show(probs),
            "at most 512 experts for a token");
  }

  void run() const {
    const int64_t rows = permuted_tokens.size(0), k = probs.defined() ? probs.size(1) : 1;
    expect_values(sorted_indices, 0, rows, "sorted_indices");
    const at::Tensor back =
        permuted_tokens.index_select(0, sorted_indices.to(at::kLong))
            .to(kF32)
            .view({probs.defined() ? probs.size(0) : rows, k, permuted_tokens.size(1)});
    out = (probs.defined() ? back.mul(probs.to(kF32).unsqueeze(-1)) : back).sum(1);
  }
};

// mirror-cann/ops-transformer moe/moe_finalize_routing_v2/docs/aclnnMoeFinalizeRoutingV2.md
struct Finalize {
  at::Tensor rows, to_row, skip1, skip2, bias, scales, experts;
  int64_t drop_pad_mode;
  Out out;

  FIELDS(all, rows, to_row, skip1, skip2, bias, scales, experts, drop_pad_mode, out)
  bool padded() const { return drop_pad_mode == 1 || drop_pad_mode == 3; }
  int64_t k() const { return scales.defined() ? scales.size(1) : 1; }

  void check_dtypes() const {
    for (const auto& [name, x] : {std::pair("skip1", skip1), {"skip2", skip2}, {"bias", bias}})
      if (x.defined())
        require(x.scalar_type() == rows.scalar_type(), name, show(x),
                "the dtype of expanded_permuted_rows");
    if (!scales.defined() || on_a5()) return;
    const bool mixed = rows.scalar_type() == kBF16 && scales.scalar_type() == kF32;
    require(mixed || scales.scalar_type() == rows.scalar_type(), "scales", show(scales),
            "the dtype of expanded_permuted_rows, or fp32 with bf16");
  }

  void check_shapes() const {
    const int64_t k = this->k(), count = to_row.numel() / std::max<int64_t>(k, 1),
                  width = rows.size(-1);
    const auto is = [](In x, int64_t height, int64_t wide) {
      return !x.defined() || (x.size(0) == height && x.size(1) == wide);
    };
    require(rows.numel() > 0 && to_row.numel() > 0, "expanded_permuted_rows", show(rows),
            "no empty tensor");
    require(to_row.numel() == count * k, "expanded_src_to_dst_row", show(to_row),
            "rows * k values");
    require(padded() || rows.size(0) == count * k, "expanded_permuted_rows", show(rows),
            "[rows * k, H]");
    require(is(scales, count, k), "scales", show(scales), "[rows, k]; without scales k is 1");
    require(is(experts, count, k), "expert_for_source_row", show(experts),
            "[rows, k]; without scales k is 1");
    require(out->dim() == 2 && is(*out, count, width), "out", show(*out), "[rows, H]");
    require(is(skip1, count, width), "skip1", show(skip1), "the shape of out");
    require(is(skip2, count, width), "skip2", show(skip2), "the shape of out");
    if (bias.defined()) {
      require(bias.size(1) == width && (!padded() || bias.size(0) == rows.size(0)), "bias",
              show(bias), "[experts, H]");
      require(bias.size(0) >= k, "bias", show(bias), "at least k experts");
    }
    require(!padded() || rows.size(0) >= k, "expanded_permuted_rows", show(rows),
            "at least k experts");
  }

  void check() const {
    require(drop_pad_mode >= 0 && drop_pad_mode <= 3, "drop_pad_mode", text(drop_pad_mode),
            "0 to 3");
    const int64_t rank = padded() ? 3 : 2;
    check_table({{"expanded_permuted_rows", rows, true, kFloats, rank, rank, kDocument},
                 {"expanded_src_to_dst_row", to_row, true, {at::kInt}, 1, 1, kDocument},
                 {"skip1", skip1, false, kFloats, 2, 2, kDocument},
                 {"skip2", skip2, false, kFloats, 2, 2, kDocument},
                 {"bias", bias, false, kFloats, 2, 2, kDocument},
                 {"scales", scales, false, kFloats, 2, 2, kDocument},
                 {"expert_for_source_row", experts, false, {at::kInt}, 2, 2, kDocument}});
    require(!skip2.defined() || skip1.defined(), "skip2", show(skip2), "skip1 beside it");
    require(!bias.defined() || experts.defined(), "expert_for_source_row", "nothing",
            "the experts, as a bias is given");
    check_dtypes();
    refusing_with(kShapeInferenceRefuses, [&] { check_shapes(); });
  }

  // What the experts give for each token and choice: [tokens, k, H]. A dropped choice (-1 in modes
  // 1 and 3) gives nothing, not even its bias: our reading.
  at::Tensor expert_results() const {
    const int64_t k = this->k(), count = out->size(0);
    const at::Tensor flat = rows.reshape({-1, rows.size(-1)});
    const at::Tensor order =
        (drop_pad_mode < 2 ? to_row.view({k, count}).t() : to_row.view({count, k}))
            .reshape({-1})
            .to(at::kLong);
    expect_values(order, padded() ? -1 : 0, flat.size(0), "expanded_src_to_dst_row");
    if (bias.defined()) expect_values(experts, 0, bias.size(0), "expert_for_source_row");
    const at::Tensor dropped = order.eq(-1);
    const at::Tensor index = padded() ? order.masked_fill(dropped, 0) : order;
    at::Tensor picked = flat.index_select(0, index).to(kF32);
    if (bias.defined())
      picked = picked.add(bias.to(kF32).index_select(0, experts.reshape({-1}).to(at::kLong)));
    return picked.masked_fill(dropped.unsqueeze(-1), 0).view({count, k, -1});
  }

  void run() const {
    at::Tensor picked = expert_results();
    if (scales.defined()) picked = picked.mul(scales.to(kF32).unsqueeze(-1));
    // The shared experts first, then the choices one by one
    // (docs/spec/ascend-operators.md 12.8).
    at::Tensor sum = at::zeros(out->sizes(), kF32);
    for (const at::Tensor& skip : {skip1, skip2})
      if (skip.defined()) sum = sum.add(skip.to(kF32));
    for (int64_t choice = 0; choice < k(); ++choice) sum = sum.add(picked.select(1, choice));
    out = sum;
  }
};

}  // namespace

NAMED(aclnnMoeGatingTopK, BuiltinGating, v1, check, run)
NAMED(aclnnMoeGatingTopKV2, BuiltinGating, v2, check_hash, run)
NAMED(aclnnMoeTokenPermute, Permute, all, check, run)
NAMED(aclnnMoeTokenUnpermute, Unpermute, all, check, run)
NAMED(aclnnMoeFinalizeRoutingV2, Finalize, all, check, run)

}  // namespace softnpu
