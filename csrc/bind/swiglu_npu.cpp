#include "swiglu_npu.h"

#include <ATen/ops/cat.h>

#include <cmath>

#include "mx_npu.h"

namespace dsv4::bind {
namespace {

WhyNot not_limited(double limit) {
  return unless(std::isfinite(limit), "the chip has no form without a limit");
}

struct Swiglu {
  // The weight goes in before the one rounding, which the chip does behind the product.
  static WhyNot why_not(const Context&, const at::Tensor& gate, const at::Tensor&,
                        const std::optional<at::Tensor>& weights, double limit) {
    return first(not_of("gate", gate, kFloats), empty("gate", gate),
                 unless(!weights || gate.scalar_type() == at::kFloat,
                        "the chip rounds before it could multiply by weights"),
                 not_limited(limit));
  }

  static at::Tensor run(const at::Tensor& gate, const at::Tensor& up,
                        const std::optional<at::Tensor>& weights, double limit) {
    const at::Tensor out = clipped(NpuCall("swiglu", gate), at::cat({gate, up}, -1), limit);
    return weights ? out.mul(weights->unsqueeze(-1)) : out;
  }
};

struct FromSums {
  static WhyNot why_not(const Context&, const at::Tensor& sums, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, double limit) {
    return first(empty("sums", sums), not_limited(limit),
                 unless(sums.size(1) % 64 == 0 && sums.size(1) <= 7232,
                        "the chip takes a multiple of 64 channels, up to 7232"));
  }

  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& sums,
                                                const at::Tensor& weight_scale,
                                                const at::Tensor& x_scale,
                                                const at::Tensor& offsets, double limit) {
    const at::Tensor counts = offsets.diff().to(at::kLong);
    return activated(NpuCall("int8_swiglu_quant", sums), sums.contiguous(),
                     weight_scale.contiguous(), x_scale.contiguous(), counts, limit);
  }
};

struct ToMx {
  static WhyNot why_not(const Context&, const at::Tensor& x, double limit) {
    return first(empty("x", x), not_limited(limit),
                 unless(x.size(1) % 128 == 0, "the chip pairs the scales of 64 channels"),
                 unless(x.size(1) >= 256, "the chip takes at least 128 channels of each half"));
  }

  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, double limit) {
    return mx_activated(NpuCall("mx_swiglu_quant", x), x.contiguous(), limit).result();
  }
};

const NpuRegistration<Swiglu, npu::ClippedSwiglu> swiglu("swiglu", Kind::composite);
const NpuRegistration<FromSums, npu::DequantSwigluQuant> int8_swiglu_quant("int8_swiglu_quant",
                                                                           Kind::composite);
const NpuRegistration<ToMx, npu::SwigluGroupQuant> mx_swiglu_quant("mx_swiglu_quant");

}  // namespace
}  // namespace dsv4::bind
