#include <ATen/ops/empty.h>
#include <ATen/ops/softplus.h>

#include "matmul_npu.h"
#include "npu/matmul.h"
#include "npu/moe.h"

namespace dsv4::bind {
namespace {

using Routed = std::tuple<at::Tensor, at::Tensor>;

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

WhyNot not_routed(const at::Tensor& x, const at::Tensor& weight) {
  return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats), empty("x", x),
               unless(weight.size(0) <= 2048, "the chip takes at most 2048 experts"));
}

struct ByScore {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&, int64_t, double) {
    return not_routed(x, weight);
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t k, double route_scale) {
    const NpuCall call("gate_topk", x);
    return choose(call, product(call, x, weight), {&bias, nullptr, nullptr, k, route_scale});
  }
};

struct ByTable {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& input_ids, const at::Tensor& tid2eid, double) {
    return first(not_routed(x, weight), not_of("input_ids", input_ids, {at::kInt, at::kLong}),
                 not_of("tid2eid", tid2eid, {input_ids.scalar_type()}),
                 unless(tid2eid.size(1) <= 64, "the chip takes at most 64 experts per token"));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_ids,
                    const at::Tensor& tid2eid, double route_scale) {
    const NpuCall call("gate_hash", x);
    return choose(call, product(call, x, weight),
                  {nullptr, &input_ids, &tid2eid, tid2eid.size(1), route_scale});
  }
};

const NpuRegistration<ByScore, npu::MoeGatingTopK, npu::Matmul> gate_topk("gate_topk");
const NpuRegistration<ByTable, npu::MoeGatingTopK, npu::Matmul> gate_hash("gate_hash");

}  // namespace
}  // namespace dsv4::bind
