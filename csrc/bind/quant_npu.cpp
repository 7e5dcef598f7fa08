#include <ATen/ops/empty.h>

#include "npu/quant.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

using Quantised = std::tuple<at::Tensor, at::Tensor>;

// One scale per row: amax / 127, or amax / 448 (A5).
template <at::ScalarType type>
struct PerToken {
  static WhyNot why_not(const Context& context, const at::Tensor& x) {
    return first(not_available<npu::DynamicQuant>(context),
                 unless(type == at::kChar || on_a5(context), "e4m3 codes exist on A5 only"),
                 not_of("x", x, kHalves), empty("x", x),
                 unless(x.dim() > 1, "the chip takes at least 2 dimensions"));
  }

  static Quantised run(const at::Tensor& x) {
    at::Tensor codes = at::empty(x.sizes(), x.options().dtype(type));
    at::Tensor scale = at::empty(x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)),
                                 x.options().dtype(at::kFloat));
    const NpuCall call(type == at::kChar ? "int8_token_quant" : "fp8_token_quant", x);
    call.launch(npu::DynamicQuant{
        call.in(x), {}, {}, {acl_type(type)}, call.out(codes), call.out(scale), {}});
    return {codes, scale};
  }
};

struct Blocks {
  static WhyNot why_not(const Context& context, const at::Tensor& x, int64_t block) {
    return first(
        not_available<npu::DynamicMxQuant>(context), not_of("x", x, kFloats), empty("x", x),
        unless(block == npu::DynamicMxQuant::kBlock, "the chip has one scale per 32 channels"),
        unless(x.size(-1) % 64 == 0, "the chip pairs the scales of 64 channels"));
  }

  static Quantised run(const at::Tensor& x, int64_t block) {
    constexpr double smallest_amax = 1e-4;
    at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
    auto pairs = x.sizes().vec();
    pairs.back() /= 2 * block;
    pairs.push_back(2);
    const at::Tensor scale = at::empty(pairs, x.options().dtype(at::kFloat8_e8m0fnu));
    const NpuCall call("act_quant", x);
    call.launch(npu::DynamicMxQuant{call.in(x),
                                    npu::DynamicMxQuant::kLastAxis,
                                    {"rint"},
                                    {npu::AclType::e4m3},
                                    block,
                                    npu::DynamicMxQuant::kRoundedUp,
                                    0.0,
                                    smallest_amax,
                                    call.out(codes),
                                    call.out(scale)});
    return {codes, scale.flatten(-2)};
  }
};

using Int8Rows = PerToken<at::kChar>;
using Fp8Rows = PerToken<at::kFloat8_e4m3fn>;
const npu::List<npu::DynamicQuant> dynamic_quant;
const npu::List<npu::DynamicMxQuant> dynamic_mx_quant;
const NpuRegistration<Int8Rows::run, Int8Rows::why_not> int8_rows("int8_token_quant",
                                                                  "aclnnDynamicQuantV2");
const NpuRegistration<Fp8Rows::run, Fp8Rows::why_not> fp8_rows("fp8_token_quant",
                                                               "aclnnDynamicQuantV2");
const NpuRegistration<Blocks::run, Blocks::why_not> blocks("act_quant", "aclnnDynamicMxQuantV3");

}  // namespace
}  // namespace dsv4::bind
