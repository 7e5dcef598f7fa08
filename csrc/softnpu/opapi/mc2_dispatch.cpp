// aclnnMoeDistributeDispatchV2, V3, V4: rows by expert to the ranks that have it, as they are or
// quantised. Arrived rows stand by expert, then by sender, then in the order of its tokens: so the
// prefix sums of epRecvCounts say; no document says it of a sender's rows.
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/round.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include "fused_quant.h"
#include "mc2.h"

namespace softnpu {
namespace {

enum : int64_t { kAsItIs = 0, kByToken = 2, kByMx = 4 };

struct Dispatch : Mc2 {
  at::Tensor x, expert_ids, scales, x_active_mask, expert_scales, elastic_info, performance_info;
  int64_t quant_mode, expert_token_nums_type;
  Out expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums, ep_recv_counts,
      tp_recv_counts, expand_scales;
  FIELDS(inputs, x, expert_ids, scales, x_active_mask, expert_scales)
  FIELDS(elastic, elastic_info)
  FIELDS(performance, performance_info)
  FIELDS(modes, quant_mode, global_bs, expert_token_nums_type, comm_alg)
  FIELDS(outputs, expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums,
         ep_recv_counts, tp_recv_counts, expand_scales)
  auto v2() { return inputs() + domain() + modes() + outputs(); }
  auto v3() { return inputs() + elastic() + domain() + modes() + specials() + outputs(); }
  auto v4() {
    return inputs() + elastic() + performance() + domain() + modes() + specials() + outputs();
  }

  void check_v2() { version = 2, check(); }
  void check_v3() { version = 3, check(); }
  void check_v4() { version = 4, check(); }

  Types types_out() const {
    return quant_mode == kByToken ? Types{kI8}
           : quant_mode == kByMx  ? Types{kE4M3, kE5M2}
                                  : Types{x.scalar_type()};
  }

  void check() {
    check_table({{"x", x, true, kHalves, 2, 2, kDocument},
                 {"expertIds", expert_ids, true, kInts, 2, 2, kDocument},
                 {"scales", scales, false, kSingle, 2, 2, kDocument},
                 {"xActiveMask", x_active_mask, false, {at::kBool}, 1, 2, kDocument},
                 {"expertScales", expert_scales, false, kSingle, 2, 2, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [&] {
      require(quant_mode == kAsItIs || quant_mode == kByToken || (quant_mode == kByMx && on_a5()),
              "quantMode", text(quant_mode),
              on_a5() ? "0, 2 or 4 (1 and 3 are not emulated)" : "0 or 2");
      require(expert_ids.size(0) == x.size(0), "expertIds", show(expert_ids),
              "a row for each row of x");
      check_domain(expert_ids, x.size(1), true);
      check_mask(x_active_mask);
      check_inputs();
    });
    check_table(
        {{"expandX", *expand_x, true, types_out(), 2, 2, kDocument},
         {"dynamicScales",
          *dynamic_scales,
          quant_mode != kAsItIs,
          {quant_mode == kByMx ? kE8M0 : kF32},
          1,
          2,
          kDocument},
         {"assistInfoForCombine", *assist_info_for_combine, true, kInts, 1, 1, kDocument},
         {"expertTokenNums", *expert_token_nums, true, {at::kLong}, 1, 1, kDocument},
         {"epRecvCounts", *ep_recv_counts, true, kInts, 1, 1, kDocument},
         {"expandScales", *expand_scales, expert_scales.defined(), kSingle, 1, 1, kDocument}},
        kTilingRefuses);
    refusing_with(kTilingRefuses, [&] { check_outputs(); });
  }

  void check_inputs() const {
    require(expert_token_nums_type == 0 || expert_token_nums_type == 1, "expertTokenNumsType",
            text(expert_token_nums_type), "0 or 1");
    require(!elastic_info.defined(), "elasticInfo", show(elastic_info), "nothing");
    require(!performance_info.defined(), "performanceInfo", show(performance_info),
            "nothing (times are not emulated)");
    if (expert_scales.defined()) {
      require(here(kOnA2), "expertScales", show(expert_scales), "nothing on this chip");
      require(expert_scales.sizes() == expert_ids.sizes(), "expertScales", show(expert_scales),
              "[BS, K]");
    }
    if (!scales.defined()) return;
    require(quant_mode == kByToken, "scales", show(scales), "nothing unless quantMode is 2");
    require(scales.size(0) == moe_expert_num && scales.size(1) == h, "scales", show(scales),
            "[moeExpertNum, H]");
  }

  void check_outputs() const {
    const int64_t a = expand_x->size(0);
    require(a >= most_rows() && expand_x->size(1) == h, "expandX", show(*expand_x),
            ("[A, H] with A at least " + text(most_rows())).c_str());
    require(assist_info_for_combine->numel() >= a * kAssistWidth, "assistInfoForCombine",
            show(*assist_info_for_combine), "[A * 128]");
    require(expert_token_nums->numel() == local_experts(), "expertTokenNums",
            show(*expert_token_nums), "[experts of this rank]");
    // A2 adds room for its reductions between servers, of which there is one here.
    require(ep_recv_counts->numel() >= moe_expert_num, "epRecvCounts", show(*ep_recv_counts),
            "a number for each rank and expert");
    require(!expert_scales.defined() || expand_scales->numel() == a, "expandScales",
            show(*expand_scales), "[A]");
    if (quant_mode == kByToken)
      require(dynamic_scales->dim() == 1 && dynamic_scales->size(0) == a, "dynamicScales",
              show(*dynamic_scales), "[A]");
    // The page says [A, ceil(H / 64)]; torch_npu allocates a scale for every 32, in pairs.
    const int64_t blocks = ceil_div(h, 64) * 2;
    if (quant_mode == kByMx)
      require(dynamic_scales->dim() == 2 && dynamic_scales->size(0) == a &&
                  dynamic_scales->size(1) == blocks,
              "dynamicScales", show(*dynamic_scales), "[A, ceil(H / 64) * 2]");
  }

  void run() const {
    Said all = said();
    all.emplace_back("quantMode", text(quant_mode));
    all.emplace_back("the dtype of expandX", show(Types{expand_x->scalar_type()}));
    together("Dispatch", all, [this] { exchange(); });
  }

  void exchange() const;
  void store_assist(In sender, In tags) const;
};

struct Rows {
  at::Tensor y, scale;  // bytes of fp8 types
};

// The scale multiplies by 127 / max and is returned as 1 / (127 / max). A row of zeros: codes and
// scale 0, as inf and NaN turn out in the kernel's conversions (our reading).
Rows by_token(In x) {
  const at::Tensor by = at::full({1}, 127.0F).div(at::amax(x.abs(), {-1}));
  const at::Tensor codes = at::round(x.mul(by.unsqueeze(-1))).nan_to_num(0.0);
  return {codes.clamp(-128, 127).to(kI8), by.reciprocal()};
}

Rows rows_of(const Dispatch& o, In token, In expert) {
  const at::Tensor rows = o.x.index_select(0, token);
  if (o.quant_mode == kAsItIs) return {rows, at::Tensor()};
  const at::Tensor wide = rows.to(kF32);
  if (o.quant_mode == kByToken)
    return by_token(o.scales.defined() ? wide.mul(o.scales.index_select(0, expert)) : wide);
  const Mx mx = mx_quantise(wide, o.expand_x->scalar_type(), {});
  return {mx.y.contiguous().view(at::kByte), mx.scale.flatten(1)};
}

// The first rows of an output; those behind them keep what they hold.
void place(Out o, In rows) {
  o.touch();
  const bool bytes = rows.scalar_type() == at::kByte;
  (bytes ? o->view(at::kByte) : *o).slice(0, 0, rows.size(0)).copy_(rows);
}

void check_batches(In batches, In whole) {
  if (batches.eq(batches[0]).all().item<bool>() || whole.all().item<bool>()) return;
  throw Fault(kKernelFault,
              "argument 'xActiveMask': found tokens without communication, expected none, as BS "
              "differs between ranks");
}

void Dispatch::exchange() const {
  const at::Tensor ids = expert_ids.reshape({-1}).to(at::kLong);
  expect_values(ids, 0, moe_expert_num, "expertIds");
  const at::Tensor pairs = active(x_active_mask).reshape({-1}).nonzero().squeeze(1);
  const at::Tensor order = at::argsort(ids.index_select(0, pairs), true, 0, false);
  const at::Tensor pair = pairs.index_select(0, order), expert = ids.index_select(0, pair);
  const at::Tensor token = pair.div(k, "floor");

  const int64_t ranks = ep_world_size, local = local_experts();
  const at::Tensor counts = at::bincount(expert, {}, moe_expert_num);
  const int64_t all_active = pairs.numel() == bs * k;
  const at::Tensor all = gathered(at::cat({counts, at::tensor({bs, all_active}, at::kLong)}));
  check_batches(all.select(1, moe_expert_num), all.select(1, moe_expert_num + 1));
  const at::Tensor sent = counts.view({ranks, local}).sum(1);
  const at::Tensor mine = all.slice(1, ep_rank_id * local, (ep_rank_id + 1) * local);
  const at::Tensor received = mine.sum(1);

  const at::Tensor arrived_expert =
      at::arange(local).repeat({ranks}).repeat_interleave(mine.reshape({-1}));
  const at::Tensor by_expert = at::argsort(arrived_expert, true, 0, false);
  if (by_expert.numel() > expand_x->size(0))
    throw Fault(kKernelFault, "argument 'expertIds': found " + text(by_expert.numel()) +
                                  " rows for this rank, expected at most A, " +
                                  text(expand_x->size(0)) + ": a token names an expert twice");
  const auto arrived = [&](In rows) {
    return exchanged(rows, sent, received).index_select(0, by_expert);
  };
  const Rows rows = rows_of(*this, token, expert);
  place(expand_x, arrived(rows.y));
  if (rows.scale.defined()) place(dynamic_scales, arrived(rows.scale));
  if (expert_scales.defined())
    place(expand_scales, arrived(expert_scales.reshape({-1}).index_select(0, pair)));
  const at::Tensor sender = at::arange(ranks).repeat_interleave(received);
  store_assist(sender.index_select(0, by_expert),
               arrived(at::stack({token, pair.remainder(k)}, 1)));

  const at::Tensor of_expert = mine.sum(0);
  expert_token_nums = expert_token_nums_type == 0 ? at::cumsum(of_expert, 0) : of_expert;
  place(ep_recv_counts, at::cumsum(mine.t().reshape({-1}), 0).to(at::kInt));
}

void Dispatch::store_assist(In sender, In tags) const {
  std::vector<int64_t> head;
  for (const auto& [what, number] : assist_head(*this)) head.push_back(number);
  head.push_back(sender.numel());
  head.resize(kAssistHead);
  const at::Tensor rows = at::cat({sender.unsqueeze(1), tags}, 1).reshape({-1});
  place(assist_info_for_combine, at::cat({at::tensor(head, at::kLong), rows}).to(at::kInt));
}

}  // namespace

NAMED(aclnnMoeDistributeDispatchV2, Dispatch, v2, check_v2, run)
NAMED(aclnnMoeDistributeDispatchV3, Dispatch, v3, check_v3, run)
NAMED(aclnnMoeDistributeDispatchV4, Dispatch, v4, check_v4, run)

}  // namespace softnpu
