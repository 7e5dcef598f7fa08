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

// By which function, and of what logits: those of folded weights are divided by 4096, and their
// bias by 64.
enum class By { vendor, builtin, folded };

template <By by>
using Chooser = std::conditional_t<by == By::vendor, npu::MoeGatingTopKHash, npu::MoeGatingTopK>;

// scores: what the function makes scores of; bias: in their unit.
template <class Function>
Routed choose(const NpuCall& call, const at::Tensor& scores, int64_t norm_type,
              const at::Tensor& bias, const Choice& choice) {
  const int64_t tokens = scores.size(0);
  at::Tensor weights = at::empty({tokens, choice.k}, scores.options());
  at::Tensor ids = at::empty({tokens, choice.k}, scores.options().dtype(at::kInt));
  const at::Tensor unused = at::empty(scores.sizes(), scores.options());
  constexpr int64_t one = 1, none = 0;
  call.launch(Function{{call.in(scores), call.maybe(bias.defined() ? &bias : nullptr),
                        call.maybe(choice.input_ids), call.maybe(choice.tid2eid), choice.k, one,
                        one, none, none, norm_type, false, choice.route_scale, 0.0,
                        call.out(weights), call.out(ids), call.out(unused)}});
  return {weights, ids};
}

// A5 knows sqrt(softplus), and vllm-ascend's gate everywhere. CANN's on A2 and A3 knows the
// sigmoid: that of logit(s / 64) is s / 64, which chooses and weighs as s does, if the bias is
// divided too. s reaches 64 at logits of 4096.
constexpr double kUnit = 64.0, kSquaredUnit = kUnit * kUnit;

template <By by>
Routed choose(const NpuCall& call, const at::Tensor& logits, const Choice& choice) {
  using Function = Chooser<by>;
  const at::Tensor bias = choice.bias ? *choice.bias : at::Tensor();
  if constexpr (by == By::folded) {
    // softplus with beta 4096 is softplus of the logit, divided by 4096, and its root is s / 64.
    return choose<Function>(call, at::softplus(logits, kSquaredUnit).sqrt_().logit_(),
                            Function::kSigmoid, bias, choice);
  } else {
    if (by == By::vendor || on_a5(npu_context())) {
      return choose<Function>(call, logits, Function::kSqrtSoftplus, bias, choice);
    }
    return choose<Function>(call, at::softplus(logits).sqrt_().div_(kUnit).logit_(),
                            Function::kSigmoid, bias.defined() ? bias.div(kUnit) : bias, choice);
  }
}

template <By by>
WhyNot not_on(const Context& context) {
  switch (by) {
    case By::vendor:
      return unless(!on_a5(context), "CANN's own gate has as few launches on this chip");
    case By::builtin:
      return std::nullopt;
    case By::folded:
      return unless(!on_a5(context), "the chip has the gate itself");
  }
}

WhyNot not_routed(const at::Tensor& x, const at::Tensor& weight) {
  return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats), empty("x", x),
               unless(weight.size(0) <= 2048, "the chip takes at most 2048 experts"));
}

template <By by>
struct ByScore {
  static constexpr const char* op = by == By::folded ? "gate_topk_folded" : "gate_topk";

  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&, int64_t, double) {
    return first(not_on<by>(context), not_routed(x, weight));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t k, double route_scale) {
    const NpuCall call(op, x);
    return choose<by>(call, product(call, x, weight), {&bias, nullptr, nullptr, k, route_scale});
  }
};

template <By by>
struct ByTable {
  static constexpr const char* op = by == By::folded ? "gate_hash_folded" : "gate_hash";

  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& input_ids, const at::Tensor& tid2eid, double) {
    return first(not_on<by>(context), not_routed(x, weight),
                 not_of("input_ids", input_ids, {at::kInt, at::kLong}),
                 not_of("tid2eid", tid2eid, {input_ids.scalar_type()}),
                 unless(tid2eid.size(1) <= 64, "the chip takes at most 64 experts per token"));
  }

  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_ids,
                    const at::Tensor& tid2eid, double route_scale) {
    const NpuCall call(op, x);
    return choose<by>(call, product(call, x, weight),
                      {nullptr, &input_ids, &tid2eid, tid2eid.size(1), route_scale});
  }
};

template <template <By> class Kernel, By by>
using Gate = NpuRegistration<Kernel<by>, Chooser<by>, npu::Matmul>;

const Gate<ByScore, By::vendor> gate_topk_by_vendor(ByScore<By::vendor>::op);
const Gate<ByScore, By::builtin> gate_topk(ByScore<By::builtin>::op);
const Gate<ByTable, By::vendor> gate_hash_by_vendor(ByTable<By::vendor>::op);
const Gate<ByTable, By::builtin> gate_hash(ByTable<By::builtin>::op);
const Gate<ByScore, By::folded> gate_topk_folded(ByScore<By::folded>::op);
const Gate<ByTable, By::folded> gate_hash_folded(ByTable<By::folded>::op);

}  // namespace
}  // namespace dsv4::bind
