#include "cpu/swiglu.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

using Weights = std::optional<at::Tensor>;

cpu::Swiglu product_of(const at::Tensor& gate, const at::Tensor& up, const Weights& weights,
                       double limit, void* y) {
  const bool weighted = weights && weights->defined();
  return {dtype_of(gate),
          gate.const_data_ptr(),
          rows_of(gate),
          up.const_data_ptr(),
          rows_of(up),
          weighted ? weights->const_data_ptr<float>() : nullptr,
          weighted ? weights->stride(0) : 0,
          static_cast<float>(limit),
          y};
}

struct SwigluKernel {
  static WhyNot why_not(const Context&, const at::Tensor& gate, const at::Tensor& up,
                        const Weights& weights, double) {
    return first(not_float_rows("gate", gate), not_float_rows("up", up),
                 weights ? not_single("weights", *weights) : std::nullopt);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& gate, const at::Tensor& up, const Weights& weights,
                        double limit) {
    at::Tensor y = new_tensor(gate.sizes(), gate.scalar_type());
    cpu::swiglu(product_of(gate, up, weights, limit, y.mutable_data_ptr()), isa);
    return y;
  }
};

struct SwigluQuantKernel {
  static WhyNot why_not(const Context& context, const at::Tensor& gate, const at::Tensor& up,
                        const Weights& weights, double limit) {
    return SwigluKernel::why_not(context, gate, up, weights, limit);
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& gate, const at::Tensor& up,
                                                const Weights& weights, double limit) {
    constexpr int64_t block = cpu::kSwigluBlock;
    at::Tensor codes = with_last(gate, gate.size(-1), at::kFloat8_e4m3fn);
    at::Tensor scales =
        with_last(gate, (gate.size(-1) + block - 1) / block, at::ScalarType::Float8_e8m0fnu);
    cpu::swiglu_quant({product_of(gate, up, weights, limit, nullptr),
                       static_cast<uint8_t*>(codes.mutable_data_ptr()),
                       static_cast<uint8_t*>(scales.mutable_data_ptr())},
                      isa);
    return {std::move(codes), std::move(scales)};
  }
};

const IsaRegistration<SwigluKernel> swiglu("swiglu");
const IsaRegistration<SwigluQuantKernel> swiglu_quant("swiglu_quant");

}  // namespace
}  // namespace dsv4::bind
