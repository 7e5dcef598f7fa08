#include "cpu/rope.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct ApplyRopeKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& cos,
                        const at::Tensor& sin) {
    return first(not_float_rows("x", x), not_float_rows("cos", cos), not_float_rows("sin", sin));
  }

  template <Isa isa>
  static void run(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    cpu::apply_rope(
        {dtype_of(x), x.mutable_data_ptr(), rows_of(x), cos.size(0), cos.size(1),
         cos.const_data_ptr<float>(), cos.stride(0), sin.const_data_ptr<float>(), sin.stride(0)},
        isa);
  }
};

struct RopeKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& inv_freq, bool) {
    return first(not_float_rows("x", x), not_single("inv_freq", inv_freq));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& positions,
                        const at::Tensor& inv_freq, bool inverse) {
    at::Tensor y = new_tensor(x.sizes(), x.scalar_type());
    cpu::rope(
        {dtype_of(x), x.const_data_ptr(), rows_of(x), positions.size(0), inv_freq.size(0),
         positions.const_data_ptr(), positions.scalar_type() == at::kLong, positions.stride(0),
         inv_freq.const_data_ptr<float>(), inv_freq.stride(0), inverse, y.mutable_data_ptr()},
        isa);
    return y;
  }
};

const IsaRegistration<ApplyRopeKernel> apply_rope("apply_rope");
const IsaRegistration<RopeKernel> rope("rope");

}  // namespace
}  // namespace dsv4::bind
