#include "cpu/token_quant.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

std::tuple<at::Tensor, at::Tensor> quantise_tokens(cpu::TokenFormat format, const at::Tensor& x,
                                                   const at::Tensor* weight, double eps, Isa isa) {
  at::Tensor codes =
      new_tensor(x.sizes(), format == cpu::TokenFormat::int8 ? at::kChar : at::kFloat8_e4m3fn);
  at::Tensor scales = new_tensor(x.sizes().slice(0, x.dim() - 1), at::kFloat);
  cpu::token_quant(
      {format, dtype_of(x), x.const_data_ptr(), rows_of(x),
       weight != nullptr ? weight->const_data_ptr() : nullptr, static_cast<float>(eps),
       static_cast<uint8_t*>(codes.mutable_data_ptr()), scales.mutable_data_ptr<float>()},
      isa);
  return {std::move(codes), std::move(scales)};
}

template <cpu::TokenFormat format>
struct TokenQuantKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x) { return not_float_rows("x", x); }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x) {
    return quantise_tokens(format, x, nullptr, 0, isa);
  }
};

struct RmsNormInt8 {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_float_rows("x", x), not_float_rows("weight", weight));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& weight,
                                                double eps) {
    return quantise_tokens(cpu::TokenFormat::int8, x, &weight, eps, isa);
  }
};

const IsaRegistration<TokenQuantKernel<cpu::TokenFormat::int8>> int8_token_quant(
    "int8_token_quant");
const IsaRegistration<TokenQuantKernel<cpu::TokenFormat::e4m3>> fp8_token_quant("fp8_token_quant");
const IsaRegistration<RmsNormInt8> rms_norm_int8("rms_norm_int8");

}  // namespace
}  // namespace dsv4::bind
