#include "cpu/rms_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

#include "argument.h"
#include "common/isa.h"
#include "registry.h"

namespace dsv4::bind {
namespace {

constexpr const char* kName = "rms_norm";

WhyNot tensor_why_not(const std::string& name, const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided) {
    return name + " is not a strided tensor";
  }
  if (tensor.scalar_type() == at::kDouble) {
    return name + " is float64, which only the reference computes";
  }
  if (tensor.dim() > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    return name + "'s last dimension is not contiguous";
  }
  return std::nullopt;
}

WhyNot rms_norm_why_not(const torch::jit::Stack& arguments) {
  const WhyNot x = tensor_why_not("x", arguments[0].toTensor());
  return x ? x : tensor_why_not("weight", arguments[1].toTensor());
}

void check(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const Argument x_argument{kName, "x", "float [..., d]", x};
  x_argument.require_float();
  x_argument.require_leading_dims();
  const Argument weight_argument{kName, "weight", "float [d]", weight};
  weight_argument.require_float();
  weight_argument.require_rank(1);
  weight_argument.require_device_of(x);
  weight_argument.require_size(0, "d", x.size(-1));
  if (!(eps >= 0)) {
    throw ArgumentError(kName, "eps", c10::str(eps), "a number >= 0");
  }
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check(x, weight, eps);
  at::Tensor y = at::empty(x.sizes(), x.options());
  cpu::rms_norm({dtype_of(x), x.const_data_ptr(), rows_of(x), dtype_of(weight), weight.const_data_ptr(),
                 static_cast<float>(eps), y.mutable_data_ptr(), rows_of(y)});
  return y;
}

const Registration<&rms_norm, &rms_norm_why_not> registration(kName, c10::DeviceType::CPU,
                                                              std::string("rms_norm/") +
                                                                  isa_name(available_isas().front()));

}  // namespace
}  // namespace dsv4::bind
