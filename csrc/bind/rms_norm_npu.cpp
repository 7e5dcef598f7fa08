#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include "npu/elementary.h"
#include "npu/norm.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

// Sizes of x with one channel.
std::vector<int64_t> one_each(const at::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = 1;
  return sizes;
}

at::Tensor normed(const char* op, const at::Tensor& x, const at::Tensor& gamma, double eps) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) {
    return y;
  }
  const at::Tensor rstd = at::empty(one_each(x), x.options().dtype(at::kFloat));
  const NpuCall call(op, x);
  call.launch(npu::RmsNorm{call.in(x), call.in(gamma), eps, call.out(y), call.out(rstd)});
  return y;
}

WhyNot not_rows(const at::Tensor& x) {
  return unless(x.dim() <= 8, "x has more than 8 dimensions");
}

struct Norm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats), not_rows(x));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const bool fits = weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat;
    const at::Tensor gamma = fits ? weight : weight.to(at::kFloat);
    return normed("rms_norm", x, gamma, eps);
  }
};

// RmsNorm rounds once, which in fp32 is what the operator does.
struct HeadNorm {
  static WhyNot why_not(const Context&, const at::Tensor& x, double) {
    return first(not_of("x", x, {at::kFloat}), not_rows(x));
  }

  static at::Tensor run(const at::Tensor& x, double eps) {
    return normed("head_rms_norm", x, at::ones({x.size(-1)}, x.options()), eps);
  }
};

// 16-bit rows round at every step.
struct RoundedHeadNorm {
  static WhyNot why_not(const Context&, const at::Tensor& x, double) {
    return first(not_of("x", x, kHalves), empty("x", x), not_rows(x));
  }

  static at::Tensor run(const at::Tensor& x, double eps) {
    const auto rounded = [&x](const at::Tensor& value) { return value.to(x.scalar_type()); };
    const at::Tensor squares = x.mul(x);
    const at::Tensor mean = at::empty(one_each(x), x.options().dtype(at::kFloat));
    const NpuCall call("head_rms_norm", x);
    call.launch(npu::Mean{call.in(squares), {{-1}}, true, {npu::AclType::f32}, call.out(mean)});
    const at::Tensor shifted = rounded(rounded(mean).to(at::kFloat).add(eps));
    return x.mul(rounded(shifted.to(at::kFloat).rsqrt()));
  }
};

const NpuRegistration<Norm, npu::RmsNorm> rms_norm("rms_norm");
const NpuRegistration<HeadNorm, npu::RmsNorm> head_rms_norm("head_rms_norm");
const NpuRegistration<RoundedHeadNorm, npu::Mean> rounded_head_rms_norm("head_rms_norm");

}  // namespace
}  // namespace dsv4::bind
