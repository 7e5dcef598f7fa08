#include <ATen/ops/empty.h>
#include <ATen/ops/softplus.h>

#include "matmul_npu.h"
#include "npu/matmul.h"
#include "npu/moe.h"

namespace dsv4::bind {
namespace {

using Routed = std::tuple<at::Tensor, at::Tensor>;

struct Choice {
  const at::Tensor *bias, *input_ids, *tid2eid;
  int64_t k;
  double route_scale;
};

// A5 knows sqrt(softplus). A2 and A3 know the sigmoid: that of logit(s / 64) is s / 64, which
// chooses and weighs as s does, if the bias is divided too. s reaches 64 at logits of 4096.
constexpr double kUnit = 64.0, kSquaredUnit = kUnit * kUnit;

// scores: what MoeGatingTopKV2 makes scores of; bias: in their unit.
Routed choose(const NpuCall& call, const at::Tensor& scores, int64_t norm_type,
              const at::Tensor& bias, const Choice& choice) {
  const int64_t tokens = scores.size(0);
  at::Tensor weights = at::empty({tokens, choice.k}, scores.options());
  at::Tensor ids = at::empty({tokens, choice.k}, scores.options().dtype(at::kInt));
  const at::Tensor unused = at::empty(scores.sizes(), scores.options());
  constexpr int64_t one = 1, none = 0;
  call.launch(npu::MoeGatingTopK{call.in(scores), call.maybe(bias.defined() ? &bias : nullptr),
                                 call.maybe(choice.input_ids), call.maybe(choice.tid2eid), choice.k,
                                 one, one, none, none, norm_type, false, choice.route_scale, 0.0,
                                 call.out(weights), call.out(ids), call.out(unused)});
  return {weights, ids};
}

Routed choose(const NpuCall& call, const at::Tensor& logits, const Choice& choice) {
  const at::Tensor bias = choice.bias ? *choice.bias : at::Tensor();
  if (on_a5(npu_context())) {
    return choose(call, logits, npu::MoeGatingTopK::kSqrtSoftplus, bias, choice);
  }
  return choose(call, at::softplus(logits).sqrt_().div_(kUnit).logit_(),
                npu::MoeGatingTopK::kSigmoid, bias.defined() ? bias.div(kUnit) : bias, choice);
}

// Of logits divided by 4096 and a bias divided by 64: softplus with beta 4096 is softplus of the
// logit, divided by 4096, and its root is s / 64.
Routed choose_folded(const NpuCall& call, const at::Tensor& logits, const Choice& choice) {
  return choose(call, at::softplus(logits, kSquaredUnit).sqrt_().logit_(),
                npu::MoeGatingTopK::kSigmoid, choice.bias ? *choice.bias : at::Tensor(), choice);
}

WhyNot not_folded(const Context& context) {
  return unless(!on_a5(context), "the chip has the gate itself");
}

WhyNot not_routed(const at::Tensor& x, const at::Tensor& weight) {
  return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats), empty("x", x),
               unless(weight.size(0) <= 2048, "the chip takes at most 2048 experts"));
}

// folded: weight and bias are divided at load.
template <bool folded>
struct ByScore {
  static constexpr const char* op = folded ? "gate_topk_folded" : "gate_topk";

  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&, int64_t, double) {
    return first(folded ? not_folded(context) : WhyNot(), not_routed(x, weight));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t k, double route_scale) {
    const NpuCall call(op, x);
    const Choice choice{&bias, nullptr, nullptr, k, route_scale};
    const at::Tensor logits = product(call, x, weight);
    return folded ? choose_folded(call, logits, choice) : choose(call, logits, choice);
  }
};

template <bool folded>
struct ByTable {
  static constexpr const char* op = folded ? "gate_hash_folded" : "gate_hash";

  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& input_ids, const at::Tensor& tid2eid, double) {
    return first(folded ? not_folded(context) : WhyNot(), not_routed(x, weight),
                 not_of("input_ids", input_ids, {at::kInt, at::kLong}),
                 not_of("tid2eid", tid2eid, {input_ids.scalar_type()}),
                 unless(tid2eid.size(1) <= 64, "the chip takes at most 64 experts per token"));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_ids,
                    const at::Tensor& tid2eid, double route_scale) {
    const NpuCall call(op, x);
    const Choice choice{nullptr, &input_ids, &tid2eid, tid2eid.size(1), route_scale};
    const at::Tensor logits = product(call, x, weight);
    return folded ? choose_folded(call, logits, choice) : choose(call, logits, choice);
  }
};

template <template <bool> class Kernel, bool folded>
using Gate = NpuRegistration<Kernel<folded>, npu::MoeGatingTopK, npu::Matmul>;

const Gate<ByScore, false> gate_topk(ByScore<false>::op);
const Gate<ByTable, false> gate_hash(ByTable<false>::op);
const Gate<ByScore, true> gate_topk_folded(ByScore<true>::op);
const Gate<ByTable, true> gate_hash_folded(ByTable<true>::op);

}  // namespace
}  // namespace dsv4::bind
