#include "cpu/rms_norm.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct RmsNormKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    const WhyNot reason = not_float_rows("x", x);
    return reason ? reason : not_float_rows("weight", weight);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, double eps) {
    at::Tensor y = like(x);
    cpu::rms_norm(
        {dtype_of(x), x.const_data_ptr(), rows_of(x), dtype_of(weight), weight.const_data_ptr(),
         static_cast<float>(eps), y.mutable_data_ptr(), rows_of(y)},
        isa);
    return y;
  }
};

const IsaRegistration<RmsNormKernel> rms_norm("rms_norm");

}  // namespace
}  // namespace dsv4::bind
