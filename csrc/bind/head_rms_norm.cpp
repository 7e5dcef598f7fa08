#include "cpu/head_rms_norm.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct HeadRmsNormKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, double) {
    return not_float_rows("x", x);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, double eps) {
    at::Tensor y = new_tensor(x.sizes(), x.scalar_type());
    cpu::head_rms_norm({dtype_of(x), x.const_data_ptr(), rows_of(x), static_cast<float>(eps),
                        y.mutable_data_ptr()},
                       isa);
    return y;
  }
};

const IsaRegistration<HeadRmsNormKernel> head_rms_norm("head_rms_norm");

}  // namespace
}  // namespace dsv4::bind
