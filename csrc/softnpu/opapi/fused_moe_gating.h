// Gating of experts, which a built-in and a vendor's operator compute alike: their checks differ.
#pragma once

#include <ATen/ops/amax.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "check.h"

namespace softnpu {

// As the pages of MoeGatingTopK and MoeGatingTopKV2 say.
struct Gating {
  at::Tensor x, bias, input_ids, tid2eid;
  int64_t k, k_group, group_count, group_select_mode, renorm, norm_type;
  bool out_flag;
  double routed_scaling_factor, eps;
  Out y, expert_idx, out;

  FIELDS(v1, x, bias, k, k_group, group_count, group_select_mode, renorm, norm_type, out_flag,
         routed_scaling_factor, eps, y, expert_idx, out)
  FIELDS(v2, x, bias, input_ids, tid2eid, k, k_group, group_count, group_select_mode, renorm,
         norm_type, out_flag, routed_scaling_factor, eps, y, expert_idx, out)

  at::Tensor only_best_groups(In scores) const {
    if (group_count == 1) return scores;
    const at::Tensor grouped = scores.view({scores.size(0), group_count, -1});
    const at::Tensor value = group_select_mode == 0 ? at::amax(grouped, {-1})
                                                    : std::get<0>(at::topk(grouped, 2)).sum(-1);
    const at::Tensor best =
        std::get<1>(at::sort(value, std::optional(true), -1, true)).slice(1, 0, k_group);
    const at::Tensor kept = at::zeros(value.sizes(), at::kBool).scatter_(1, best, true);
    return grouped
        .masked_fill(kept.logical_not().unsqueeze(-1), -std::numeric_limits<double>::infinity())
        .view(scores.sizes());
  }

  at::Tensor best_experts(In p) const {
    const at::Tensor scores = only_best_groups(bias.defined() ? p.add(bias.to(kF32)) : p);
    return std::get<1>(at::sort(scores, std::optional(true), -1, true))
        .slice(1, 0, k);  // ties: smaller id, our reading
  }

  // The pages divide by the sum of all experts, or (hash mode) by that of the chosen ones: always
  // the second, as torch_npu's documentation says.
  void run() const {
    const at::Tensor wide = x.to(kF32);
    const at::Tensor p = norm_type == 0   ? at::softmax(wide, -1)
                         : norm_type == 1 ? at::sigmoid(wide)
                                          : at::softplus(wide).sqrt();
    const bool by_table = input_ids.defined() && tid2eid.defined();
    if (by_table) expect_values(input_ids, 0, tid2eid.size(0), "input_ids");
    const at::Tensor chosen =
        by_table ? tid2eid.to(at::kLong).index_select(0, input_ids.to(at::kLong)) : best_experts(p);
    if (by_table) expect_values(chosen, 0, x.size(1), "tid2eid");
    const at::Tensor weights = p.gather(1, chosen);
    const bool sum_to_one = norm_type != 0 || renorm == 1;
    y = (sum_to_one ? weights.div(weights.sum(-1, true).add(eps)) : weights)
            .mul(routed_scaling_factor);
    expert_idx = chosen;
    if (out_flag) out = p;
  }
};

}  // namespace softnpu
