#include "quant_npu.h"

#include "mx_npu.h"

namespace dsv4::bind {
namespace {

template <at::ScalarType type>
struct PerToken {
  static WhyNot why_not(const Context& context, const at::Tensor& x) {
    return first(unless(type == at::kChar || on_a5(context), "e4m3 codes exist on A5 only"),
                 not_of("x", x, kHalves), empty("x", x),
                 unless(x.dim() > 1, "the chip takes at least 2 dimensions"));
  }

  static Quantised run(const at::Tensor& x) {
    return token_quantised(NpuCall(type == at::kChar ? "int8_token_quant" : "fp8_token_quant", x),
                           x, type);
  }
};

struct ActQuant {
  static WhyNot why_not(const Context&, const at::Tensor& x, int64_t block) {
    return first(not_of("x", x, kFloats), empty("x", x),
                 unless(block == kMxBlock, "the chip has one scale per 32 channels"),
                 unless(x.size(-1) % 64 == 0, "the chip pairs the scales of 64 channels"));
  }

  static Quantised run(const at::Tensor& x, int64_t) {
    return mx_quantised(NpuCall("act_quant", x), x.contiguous()).result();
  }
};

const NpuRegistration<PerToken<at::kChar>, npu::DynamicQuant> int8_token_quant("int8_token_quant");
const NpuRegistration<PerToken<at::kFloat8_e4m3fn>, npu::DynamicQuant> fp8_token_quant(
    "fp8_token_quant");
const NpuRegistration<ActQuant, npu::DynamicMxQuant> act_quant("act_quant");

}  // namespace
}  // namespace dsv4::bind
