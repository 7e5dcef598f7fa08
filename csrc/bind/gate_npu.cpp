#include <ATen/ops/empty.h>
#include <ATen/ops/softplus.h>

#include "npu/matmul.h"
#include "npu/moe.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

using Routed = std::tuple<at::Tensor, at::Tensor>;

// fp32 logits [T, E]; products of bf16 inputs are exact and their sums stay fp32.
at::Tensor logits(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight) {
  const bool alike = x.scalar_type() == weight.scalar_type();
  const at::Tensor rows = alike ? x : x.to(at::kFloat);
  const at::Tensor columns = (alike ? weight : weight.to(at::kFloat)).t();
  const at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  call.launch(
      npu::Matmul{call.in(rows), call.in(columns), call.out(out), npu::Matmul::kKeepPrecision});
  return out;
}

// What MoeGatingTopKV2 makes scores of.
struct Scores {
  at::Tensor values;
  int64_t norm_type;
  double unit;  // of the scores, and so of the bias
};

// A5 knows sqrt(softplus). A2 and A3 know the sigmoid: that of logit(s / 64) is s / 64, which
// chooses and weighs as s does, if the bias is divided too. s reaches 64 at logits of 4096.
Scores scores_of(const at::Tensor& logits) {
  constexpr double unit = 64.0;
  if (on_a5(npu_context())) {
    return {logits, npu::MoeGatingTopK::kSqrtSoftplus, 1.0};
  }
  return {at::softplus(logits).sqrt_().div_(unit).logit_(), npu::MoeGatingTopK::kSigmoid, unit};
}

struct Choice {
  const at::Tensor *bias, *input_ids, *tid2eid;
  int64_t k;
  double route_scale;
};

Routed choose(const NpuCall& call, const at::Tensor& logits, const Choice& choice) {
  const auto [scores, norm_type, unit] = scores_of(logits);
  const int64_t tokens = scores.size(0);
  const at::Tensor bias = choice.bias ? choice.bias->div(unit) : at::Tensor();
  at::Tensor weights = at::empty({tokens, choice.k}, scores.options());
  at::Tensor ids = at::empty({tokens, choice.k}, scores.options().dtype(at::kInt));
  const at::Tensor unused = at::empty(scores.sizes(), scores.options());
  constexpr int64_t one = 1, none = 0;
  call.launch(npu::MoeGatingTopK{call.in(scores), call.maybe(choice.bias ? &bias : nullptr),
                                 call.maybe(choice.input_ids), call.maybe(choice.tid2eid), choice.k,
                                 one, one, none, none, norm_type, false, choice.route_scale, 0.0,
                                 call.out(weights), call.out(ids), call.out(unused)});
  return {weights, ids};
}

WhyNot not_routed(const Context& context, const at::Tensor& x, const at::Tensor& weight) {
  return first(not_available<npu::MoeGatingTopK>(context), not_available<npu::Matmul>(context),
               not_of("x", x, kFloats), not_of("weight", weight, kFloats), empty("x", x),
               unless(weight.size(0) <= 2048, "the chip takes at most 2048 experts"));
}

struct ByScore {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&, int64_t, double) {
    return not_routed(context, x, weight);
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t k, double route_scale) {
    const NpuCall call("gate_topk", x);
    return choose(call, logits(call, x, weight), {&bias, nullptr, nullptr, k, route_scale});
  }
};

struct ByTable {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& input_ids, const at::Tensor& tid2eid, double) {
    return first(not_routed(context, x, weight),
                 not_of("input_ids", input_ids, {at::kInt, at::kLong}),
                 not_of("tid2eid", tid2eid, {input_ids.scalar_type()}),
                 unless(tid2eid.size(1) <= 64, "the chip takes at most 64 experts per token"));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_ids,
                    const at::Tensor& tid2eid, double route_scale) {
    const NpuCall call("gate_hash", x);
    return choose(call, logits(call, x, weight),
                  {nullptr, &input_ids, &tid2eid, tid2eid.size(1), route_scale});
  }
};

const npu::List<npu::MoeGatingTopK> gating;
const NpuRegistration<ByScore::run, ByScore::why_not> by_score("gate_topk", "aclnnMoeGatingTopKV2");
const NpuRegistration<ByTable::run, ByTable::why_not> by_table("gate_hash", "aclnnMoeGatingTopKV2");

}  // namespace
}  // namespace dsv4::bind
