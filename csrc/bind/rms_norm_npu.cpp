#include <ATen/ops/empty.h>

#include "npu/norm.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

struct Norm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats),
                 unless(x.dim() <= 8, "x has more than 8 dimensions"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, double eps) {
    at::Tensor y = at::empty(x.sizes(), x.options());
    if (y.numel() == 0) {
      return y;
    }
    std::vector<int64_t> rows = x.sizes().vec();
    rows.back() = 1;
    const at::Tensor rstd = at::empty(rows, x.options().dtype(at::kFloat));
    const bool fits = weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat;
    const at::Tensor gamma = fits ? weight : weight.to(at::kFloat);
    const NpuCall call("rms_norm", x);
    call.launch(npu::RmsNorm{call.in(x), call.in(gamma), eps, call.out(y), call.out(rstd)});
    return y;
  }
};

const NpuRegistration<Norm, npu::RmsNorm> rms_norm("rms_norm");

}  // namespace
}  // namespace dsv4::bind
