#include <ATen/ops/ones.h>

#include "mx_npu.h"
#include "norm_npu.h"
#include "npu/elementary.h"

namespace dsv4::bind {
namespace {

at::Tensor norm(const char* op, const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x.numel() == 0 ? at::empty(x.sizes(), x.options())
                        : normed(NpuCall(op, x), x, weight, eps);
}

WhyNot not_rows(const at::Tensor& x) {
  return unless(x.dim() <= 8, "x has more than 8 dimensions");
}

struct Norm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_of("x", x, kFloats), not_of("weight", weight, kFloats), not_rows(x));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, double eps) {
    return norm("rms_norm", x, weight, eps);
  }
};

// The normed rows are quantised straight from fp32.
struct NormInt8 {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_of("x", x, kHalves), not_of("weight", weight, {x.scalar_type()}),
                 empty("x", x), not_rows(x),
                 unless(x.size(-1) <= npu::RmsNormDynamicQuant::kWidest,
                        "the chip takes rows of at most 8192 channels"),
                 unless(x.dim() > 1, "the chip takes rows of at least two dimensions"));
  }

  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& weight,
                                                double eps) {
    using Norm = npu::RmsNormDynamicQuant;
    const at::Tensor rows = x.contiguous(), gamma = weight.contiguous();
    at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar));
    at::Tensor scale = at::empty(x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)),
                                 x.options().dtype(at::kFloat));
    const NpuCall call("rms_norm_int8", x);
    call.launch(Norm{
        call.in(rows), call.in(gamma), {}, {}, eps, Norm::kInt8, call.out(codes), call.out(scale)});
    return {codes, scale};
  }
};

struct NormMx {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight, double) {
    return first(not_of("x", x, kHalves), not_of("weight", weight, {x.scalar_type(), at::kFloat}),
                 empty("x", x), unless(x.dim() <= 7, "x has more than 7 dimensions"),
                 unless(x.size(-1) % (2 * kMxBlock) == 0, "the chip pairs scales of 64 channels"));
  }

  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& weight,
                                                double eps) {
    using Norm = npu::RmsNormDynamicMxQuant;
    const at::Tensor in = x.contiguous(), gamma = weight.contiguous();
    const MxRows rows(x.sizes(), x.options());
    const at::Tensor no_rstd = at::empty(one_each(x), x.options().dtype(at::kFloat));
    const NpuCall call("rms_norm_mx", x);
    call.launch(Norm{call.in(in),
                     call.in(gamma),
                     {},
                     eps,
                     Norm::kRoundedUp,
                     {"rint"},
                     Norm::kE4m3,
                     false,
                     call.out(rows.codes),
                     call.out(rows.pairs),
                     call.out(no_rstd)});
    return rows.result();
  }
};

// RmsNorm rounds once, which in fp32 is what the operator does.
struct HeadNorm {
  static WhyNot why_not(const Context&, const at::Tensor& x, double) {
    return first(not_of("x", x, {at::kFloat}), not_rows(x));
  }

  static at::Tensor run(const at::Tensor& x, double eps) {
    return norm("head_rms_norm", x, at::ones({x.size(-1)}, x.options()), eps);
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
const NpuRegistration<NormInt8, npu::RmsNormDynamicQuant> rms_norm_int8("rms_norm_int8");
const NpuRegistration<NormMx, npu::RmsNormDynamicMxQuant> rms_norm_mx("rms_norm_mx");
const NpuRegistration<HeadNorm, npu::RmsNorm> head_rms_norm("head_rms_norm", Kind::composite);
const NpuRegistration<RoundedHeadNorm, npu::Mean> rounded_head_rms_norm("head_rms_norm",
                                                                        Kind::composite);

}  // namespace
}  // namespace dsv4::bind
