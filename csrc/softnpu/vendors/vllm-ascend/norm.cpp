// vllm-project/vllm-ascend csrc/attention/rms_norm_dynamic_quant: definition, tiling and kernel.
// CANN has another operator of this name, with other arguments.
#include <ATen/ops/where.h>

#include <limits>

#include "softnpu/opapi/fused_family.h"
#include "softnpu/opapi/fused_norm.h"

namespace softnpu {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct NormTwice {
  at::Tensor x, gamma, smooth_scale1, smooth_scale2, beta;
  double epsilon;
  std::vector<bool> output_mask;
  int64_t dst_type;
  Out y1, y2, scale1, scale2;
  FIELDS(all, x, gamma, smooth_scale1, smooth_scale2, beta, epsilon, output_mask, dst_type, y1, y2,
         scale1, scale2)

  // A mask of two chooses; without one there is a second result if it has a smooth scale.
  bool masked() const { return output_mask.size() == 2; }
  bool first() const { return !masked() || output_mask[0]; }
  bool second() const { return masked() ? output_mask[1] : smooth_scale2.defined(); }

  void check_result(bool wanted, const char* rows, In y, const char* scales, In scale) const {
    if (!wanted) return;
    require(y.sizes() == x.sizes(), rows, show(y), "the shape of x");
    require(scale.sizes() == x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)), scales,
            show(scale), "the shape of x without its last dimension");
  }

  void check_shapes() const {
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(gamma.size(0) == x.size(-1), "gamma", show(gamma), "the last dimension of x");
    require(epsilon > 0, "epsilon", shown(epsilon), "a number above 0");
    for (const auto& [name, scale] :
         {std::pair{"smooth_scale1", smooth_scale1}, std::pair{"smooth_scale2", smooth_scale2},
          std::pair{"beta", beta}})
      require(!scale.defined() || scale.sizes() == gamma.sizes(), name, show(scale),
              "the shape of gamma");
    require(masked() || smooth_scale1.defined() || !smooth_scale2.defined(), "smooth_scale1",
            "nothing", "a tensor beside smooth_scale2");
    check_result(first(), "y1", *y1, "scale1", *scale1);
    check_result(second(), "y2", *y2, "scale2", *scale2);
  }

  // int4 results are not emulated. dst_type decides nothing: the dtype of y1 does.
  void check() const {
    require_generation(kOnA2A3);
    const Types own = {x.defined() ? x.scalar_type() : kNone};
    check_table({{"x", x, true, kHalves, 2, 8, kReading},
                 {"gamma", gamma, true, own, 1, 1, kReading},
                 {"smooth_scale1", smooth_scale1, false, own, 1, 1, kDocument},
                 {"smooth_scale2", smooth_scale2, false, own, 1, 1, kDocument},
                 {"beta", beta, false, own, 1, 1, kReading},
                 {"y1", *y1, true, {kI8}, 1, 8, kReading},
                 {"y2", *y2, true, {kI8}, 1, 8, kReading},
                 {"scale1", *scale1, true, {kF32}, 1, 8, kDocument},
                 {"scale2", *scale2, true, {kF32}, 1, 8, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [this] { check_shapes(); });
  }

  // Rows of zeros have no scale, as with CANN's own operator: our reading.
  void quantise(In normed, In smooth, const Out& y, const Out& scale) const {
    const Int8Rows rows = quantised_rows(smooth.defined() ? normed.mul(smooth.to(kF32)) : normed);
    y = rows.y;
    scale = at::where(rows.scale.eq(0), kNan, rows.scale);
  }

  void run() const {
    const at::Tensor wide = x.to(kF32);
    const at::Tensor normed = normalised(wide, inverse_rms(wide, 1, epsilon), gamma, beta);
    if (first()) quantise(normed, smooth_scale1, y1, scale1);
    if (second()) quantise(normed, smooth_scale2, y2, scale2);
  }
};

}  // namespace

NAMED(aclnnRmsNormDynamicQuant, NormTwice, all, check, run)

}  // namespace softnpu
