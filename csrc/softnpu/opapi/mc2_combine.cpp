// aclnnMoeDistributeCombineV2, V3, V4: rows go back to the ranks of their tokens and are summed
// there in fp32, in the order of the choices, each times its weight; then the shared expert's row;
// one rounding. So the kernel does (op_kernel/moe_distribute_combine_v2.h); the pages give the sum.
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "mc2.h"

namespace softnpu {
namespace {

struct Combine : Mc2 {
  at::Tensor expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales,
      tp_send_counts, x_active_mask, activation_scale, weight_scale, group_list, expand_scales,
      shared_expert_x, elastic_info, ori_x, const_expert_alpha_1, const_expert_alpha_2,
      const_expert_v, performance_info;
  int64_t out_dtype, comm_quant_mode, group_list_type;
  Out x;
  FIELDS(inputs, expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales,
         tp_send_counts, x_active_mask, activation_scale, weight_scale, group_list, expand_scales,
         shared_expert_x)
  FIELDS(special_inputs, elastic_info, ori_x, const_expert_alpha_1, const_expert_alpha_2,
         const_expert_v)
  FIELDS(performance, performance_info)
  FIELDS(modes, global_bs, out_dtype, comm_quant_mode, group_list_type, comm_alg)
  FIELDS(output, x)
  auto v2() { return inputs() + domain() + modes() + output(); }
  auto v3() { return inputs() + special_inputs() + domain() + modes() + specials() + output(); }
  auto v4() {
    return inputs() + special_inputs() + performance() + domain() + modes() + specials() + output();
  }

  void check_v2() { version = 2, check(); }
  void check_v3() { version = 3, check(); }
  void check_v4() { version = 4, check(); }

  void check() {
    check_table(
        {{"expandX", expand_x, true, kHalves, 2, 2, kDocument},
         {"expertIds", expert_ids, true, kInts, 2, 2, kDocument},
         {"assistInfoForCombine", assist_info_for_combine, true, kInts, 1, 1, kDocument},
         {"epSendCounts", ep_send_counts, true, kInts, 1, 1, kDocument},
         {"expertScales", expert_scales, true, kSingle, 2, 2, kDocument},
         {"tpSendCounts", tp_send_counts, false, kInts, 1, 1, kDocument},
         {"xActiveMask", x_active_mask, false, {at::kBool}, 1, 2, kDocument},
         {"expandScales", expand_scales, false, kSingle, 1, 1, kDocument},
         {"sharedExpertX", shared_expert_x, false, {expand_x.scalar_type()}, 2, 3, kReading},
         {"x", *x, true, {expand_x.scalar_type()}, 2, 2, kDocument}},
        kTilingRefuses);
    refusing_with(kTilingRefuses, [&] {
      check_domain(expert_ids, expand_x.size(1), false);
      check_mask(x_active_mask);
      check_values();
      check_sizes();
    });
  }

  void check_values() const {
    const bool known = comm_quant_mode == 0 || comm_quant_mode == 2 ||
                       (on_a5() && (comm_quant_mode == 3 || comm_quant_mode == 4));
    require(known && (comm_quant_mode == 0 || !here(kOnA2)), "commQuantMode", text(comm_quant_mode),
            here(kOnA2) ? "0 without hierarchy"
            : on_a5()   ? "0, 2, 3 or 4"
                        : "0 or 2");
    require(comm_quant_mode == 0, "commQuantMode",
            text(comm_quant_mode) + ", which is not emulated", "0");
    require(out_dtype == 0, "outDtype", text(out_dtype), "0");
    require(group_list_type == 0, "groupListType", text(group_list_type), "0");
    const std::pair<const char*, In> absent[] = {
        {"activationScale", activation_scale},
        {"weightScale", weight_scale},
        {"groupList", group_list},
        {"elasticInfo", elastic_info},
        {"performanceInfo", performance_info},
        {"constExpertAlpha1", const_expert_alpha_1},
        {"constExpertAlpha2", const_expert_alpha_2},
        {"constExpertV", const_expert_v},
    };
    for (const auto& [argument, tensor] : absent)
      require(!tensor.defined(), argument, show(tensor), "nothing");
    require(!tp_send_counts.defined() || tp_send_counts.numel() <= 1, "tpSendCounts",
            show(tp_send_counts), "nothing without a TP domain");
    require(!expand_scales.defined() || here(kOnA2), "expandScales", show(expand_scales),
            "nothing on this chip");
    require(!shared_expert_x.defined() || !here(kOnA2), "sharedExpertX", show(shared_expert_x),
            "nothing on this chip");
  }

  void check_sizes() const {
    const int64_t a = expand_x.size(0);
    require(a >= most_rows(), "expandX", show(expand_x),
            ("[A, H] with A at least " + text(most_rows())).c_str());
    require(assist_info_for_combine.numel() >= a * kAssistWidth, "assistInfoForCombine",
            show(assist_info_for_combine), "[A * 128]");
    require(ep_send_counts.numel() >= moe_expert_num, "epSendCounts", show(ep_send_counts),
            "a number for each rank and expert");
    require(expert_scales.sizes() == expert_ids.sizes(), "expertScales", show(expert_scales),
            "[BS, K]");
    require(!shared_expert_x.defined() ||
                (shared_expert_x.numel() == bs * h && shared_expert_x.size(-1) == h),
            "sharedExpertX", show(shared_expert_x), "[BS, H], BS in one or two dimensions");
    require(!ori_x.defined() || ori_x.sizes() == at::IntArrayRef({bs, h}), "oriX", show(ori_x),
            "[BS, H]");
    require(x->size(0) == bs && x->size(1) == h, "x", show(*x), "[BS, H]");
  }

  void run() const {
    Said all = said();
    all.emplace_back("commQuantMode", text(comm_quant_mode));
    all.emplace_back("the dtype of expandX", show(Types{expand_x.scalar_type()}));
    together("Combine", all, [this] { exchange(); });
  }

  at::Tensor counts() const;
  void exchange() const;
  void sum(In rows, In of_choice, In chosen) const;
};

[[noreturn]] void mismatch(const char* argument, const std::string& what) {
  throw Fault(kKernelFault, std::string("argument '") + argument + "': " + what);
}

// How many rows go back to each rank from each expert here, [experts, ranks]; what dispatch left
// must say the same as this call.
at::Tensor Combine::counts() const {
  const std::string other = " of another dispatch than this call's";
  int64_t place = 0;
  for (const auto& [what, number] : assist_head(*this)) {
    const int64_t found = assist_info_for_combine[place++].item<int64_t>();
    if (found != number)
      mismatch("assistInfoForCombine", std::string("found ") + what + " " + text(found) +
                                           ", expected " + text(number) +
                                           ": its dispatch was another one");
  }
  const at::Tensor ends = ep_send_counts.slice(0, 0, moe_expert_num).to(at::kLong);
  const at::Tensor counts = at::cat({ends.slice(0, 0, 1), ends.diff()});
  const int64_t rows = ends[-1].item<int64_t>();
  if (rows != assist_info_for_combine[place].item<int64_t>() || counts.lt(0).any().item<bool>())
    mismatch("epSendCounts", "found counts" + other);
  return counts.view({local_experts(), ep_world_size});
}

void Combine::exchange() const {
  const at::Tensor by_expert = counts();
  const int64_t rows = by_expert.sum().item<int64_t>();
  const at::Tensor tags =
      assist_info_for_combine.slice(0, kAssistHead, kAssistHead + rows * kAssistOfRow)
          .view({rows, kAssistOfRow});
  const at::Tensor to = at::arange(ep_world_size)
                            .repeat({local_experts()})
                            .repeat_interleave(by_expert.reshape({-1}));
  if (!tags.select(1, 0).eq(to).all().item<bool>())
    mismatch("epSendCounts", "found counts of another dispatch than assistInfoForCombine's");
  const at::Tensor order = at::argsort(to, true, 0, false);
  const at::Tensor sent = by_expert.sum(0), received = gathered(sent).select(1, ep_rank_id);
  const auto back = [&](In values) {
    return exchanged(values.index_select(0, order), sent, received);
  };
  const at::Tensor arrived = back(expand_x.slice(0, 0, rows));
  const at::Tensor of = back(tags).to(at::kLong);

  const at::Tensor chosen = active(x_active_mask);
  const at::Tensor pair = of.select(1, 1).mul(k).add(of.select(1, 2));
  expect_values(pair, 0, bs * k, "assistInfoForCombine");
  const at::Tensor of_choice = at::full({bs * k}, -1, at::kLong);
  of_choice.index_copy_(0, pair, at::arange(pair.numel()));
  if (!of_choice.ge(0).eq(chosen.reshape({-1})).all().item<bool>())
    mismatch("xActiveMask", "found other tokens than those of the dispatch");
  const at::Tensor owner =
      at::arange(ep_world_size).repeat_interleave(received);  // the rank that each came from
  const at::Tensor expert = expert_ids.reshape({-1}).to(at::kLong).index_select(0, pair);
  if (!expert.div(local_experts(), "floor").eq(owner).all().item<bool>())
    mismatch("expertIds", "found other experts than those of the dispatch");
  sum(arrived, of_choice.view({bs, k}), chosen);
}

// Tokens without any choice keep what `x` held, also with a shared expert.
void Combine::sum(In rows, In of_choice, In chosen) const {
  const at::Tensor total = at::zeros({bs, h}, kF32);
  for (int64_t choice = 0; choice < k; ++choice) {
    const at::Tensor tokens = chosen.select(1, choice).nonzero().squeeze(1);
    const at::Tensor row = of_choice.select(1, choice).index_select(0, tokens);
    const at::Tensor weight = expert_scales.select(1, choice).index_select(0, tokens);
    total.index_add_(0, tokens, rows.index_select(0, row).to(kF32).mul(weight.unsqueeze(1)));
  }
  if (shared_expert_x.defined()) total.add_(shared_expert_x.reshape({bs, h}));
  const at::Tensor written = chosen.any(1).nonzero().squeeze(1);
  x.touch();
  x->index_copy_(0, written, total.index_select(0, written).to(x->scalar_type()));
}

}  // namespace

NAMED(aclnnMoeDistributeCombineV2, Combine, v2, check_v2, run)
NAMED(aclnnMoeDistributeCombineV3, Combine, v3, check_v3, run)
NAMED(aclnnMoeDistributeCombineV4, Combine, v4, check_v4, run)

}  // namespace softnpu
