#include "cpu/hadamard.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct HadamardKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x) { return not_float_rows("x", x); }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x) {
    at::Tensor y = new_tensor(x.sizes(), x.scalar_type());
    cpu::hadamard({dtype_of(x), x.const_data_ptr(), rows_of(x), y.mutable_data_ptr()}, isa);
    return y;
  }
};

const IsaRegistration<HadamardKernel> hadamard("hadamard");

}  // namespace
}  // namespace dsv4::bind
