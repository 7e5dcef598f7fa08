// RMS norm and quantisation in one call. Tables: argument, its tensor, required, dtypes, ranks,
// source.
#include <ATen/ops/isnan.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/where.h>

#include <limits>

#include "fused_family.h"
#include "fused_norm.h"

namespace softnpu {

at::Tensor inverse_rms(In wide, int64_t axes, double epsilon) {
  std::vector<int64_t> last;
  for (int64_t axis = -axes; axis < 0; ++axis) last.push_back(axis);
  // The nearest fp32: of zeros and an epsilon of 1e-6 it is 1000, as torch_npu's tests have it.
  return at::rsqrt(at::mean(wide.square(), last, true).to(at::kDouble).add(epsilon)).to(kF32);
}

at::Tensor normalised(In wide, In r, In gamma, In beta) {
  const at::Tensor y = wide.mul(r).mul(gamma.to(kF32));
  return beta.defined() ? y.add(beta.to(kF32)) : y;
}

std::vector<int64_t> outer_sizes(In x, int64_t axes) {
  return x.sizes().slice(0, static_cast<size_t>(x.dim() - axes)).vec();
}

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void require_vector(const char* argument, In vector, In like, int64_t length) {
  if (!vector.defined()) return;
  require(vector.size(0) == length && vector.scalar_type() == like.scalar_type(), argument,
          show(vector), "shape and dtype of gamma");
}

// mirror-cann/ops-nn norm/rms_norm_dynamic_quant/docs/aclnnRmsNormDynamicQuant.md; the custom
// packages have another operator of this name, with other arguments.
struct NormInt8 {
  at::Tensor x, gamma, smooth_scales, beta;
  double epsilon;
  int64_t dst_type;
  Out y, scale;
  FIELDS(all, x, gamma, smooth_scales, beta, epsilon, dst_type, y, scale)

  void check_shapes() const {
    const int64_t width = x.size(-1);
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(width <= 8192, "x", show(x), "a last dimension of at most 8192");
    require(gamma.size(0) == width, "gamma", show(gamma), "the last dimension of x");
    require_vector("smoothScales", smooth_scales, gamma, width);
    require_vector("beta", beta, gamma, width);
    require(dst_type == 2, "dstType", text(dst_type), "2 (INT8)");
    require(y->sizes() == x.sizes(), "yOut", show(*y), "the shape of x");
    require(scale->sizes() == x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)), "scaleOut",
            show(*scale), "the shape of x without its last dimension");
  }

  void check() const {
    require_family(kOnA2A3);
    const auto type = x.defined() ? x.scalar_type() : kNone;
    check_table({{"x", x, true, kHalves, 2, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 1, kDocument},
                 {"smoothScales", smooth_scales, false, {type}, 1, 1, kDocument},
                 {"beta", beta, false, {type}, 1, 1, kDocument},
                 {"yOut", *y, true, {kI8}, 2, 8, kDocument},
                 {"scaleOut", *scale, true, {kF32}, 1, 8, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [this] { check_shapes(); });
  }

  void run() const {
    const at::Tensor wide = x.to(kF32);
    at::Tensor normed = normalised(wide, inverse_rms(wide, 1, epsilon), gamma, beta);
    if (smooth_scales.defined()) normed = normed.mul(smooth_scales.to(kF32));
    const Int8Rows rows = quantised_rows(normed);
    y = rows.y;
    // "x is not to be all zeros": such a row's scale is NaN here (our reading).
    scale = at::where(rows.scale.eq(0), kNan, rows.scale);
  }
};

// mirror-cann/ops-nn norm/rms_norm_dynamic_mx_quant/docs/aclnnRmsNormDynamicMxQuant.md. FLOAT4_E1M2
// is not emulated.
struct NormMx {
  at::Tensor x, x2, gamma, beta;
  double epsilon;
  int64_t scale_alg;
  std::string round_mode;
  int64_t dst_type;
  bool output_rstd;
  Out y, sum, mxscale, rstd;
  FIELDS(all, x, gamma, beta, epsilon, scale_alg, round_mode, dst_type, output_rstd, y, mxscale,
         rstd)
  FIELDS(added, x, x2, gamma, beta, epsilon, scale_alg, round_mode, dst_type, output_rstd, y, sum,
         mxscale, rstd)

  bool fp4() const { return y->scalar_type() == kE2M1; }

  void check_modes() const {
    const int64_t number = fp4() ? 40 : y->scalar_type() == kE4M3 ? 36 : 35;
    require(dst_type == number, "dstType", text(dst_type),
            "the number of yOut's dtype: 35 (E5M2), 36 (E4M3FN) or 40 (E2M1)");
    require(scale_alg == 0 || (scale_alg == 1 && !fp4()), "scaleAlg", text(scale_alg),
            "0, or 1 for FLOAT8");
    require(round_mode.empty() || round_mode == "rint" ||
                (fp4() && (round_mode == "floor" || round_mode == "round")),
            "roundMode", round_mode, fp4() ? "rint, floor or round" : "rint, as yOut is FLOAT8");
  }

  void check_shapes() const {
    const int64_t width = x.size(-1);
    require(!fp4() || width % 2 == 0, "x", show(x), "an even last dimension, as yOut is FLOAT4");
    require(gamma.size(0) == width, "gamma", show(gamma), "the last dimension of x");
    require_vector("beta", beta, gamma, width);
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = fp4() ? width / 2 : width;
    require(y->sizes() == at::IntArrayRef(shape), "yOut", show(*y), "the shape of x");
    shape.back() = ceil_div(width, 64);
    shape.push_back(2);
    require_sizes("mxscaleOut", *mxscale, shape);
    if (!output_rstd) return;
    shape.pop_back();
    shape.back() = 1;
    require_sizes("rstdOut", *rstd, shape);
  }

  void check() const {
    require_family(kOnA5);
    const auto type = x.defined() ? x.scalar_type() : kNone;
    check_table({{"x", x, true, kHalves, 1, 7, kDocument},
                 {"gamma", gamma, true, {type, kF32}, 1, 1, kDocument},
                 {"beta", beta, false, {type, kF32}, 1, 1, kDocument},
                 {"yOut", *y, true, {kE4M3, kE5M2, kE2M1}, 1, 7, kDocument},
                 {"mxscaleOut", *mxscale, true, {kE8M0}, 2, 8, kDocument},
                 {"rstdOut", *rstd, output_rstd, {kF32}, 1, 7, kDocument}},
                kShapeInferenceRefuses);
    refusing_with(kShapeInferenceRefuses, [this] {
      check_modes();
      check_shapes();
    });
  }

  // mirror-cann/ops-nn norm/add_rms_norm_dynamic_mx_quant/docs/aclnnAddRmsNormDynamicMxQuant.md
  void check_added() const {
    check();
    check_table({{"x2", x2, true, {x.scalar_type()}, 1, 7, kDocument},
                 {"xOut", *sum, true, {x.scalar_type()}, 1, 7, kDocument}},
                kShapeInferenceRefuses);
    refusing_with(kShapeInferenceRefuses, [this] {
      require(x2.sizes() == x.sizes(), "x2", show(x2), "the shape of x1");
      require(sum->sizes() == x.sizes(), "xOut", show(*sum), "the shape of x1");
    });
  }

  void run_added() const {
    NormMx normed(*this);
    normed.x = x.to(kF32).add(x2.to(kF32));  // normalised before it is rounded: our reading
    sum = normed.x;
    normed.run();
  }

  void run() const {
    if (x.numel() == 0) return;
    const at::Tensor wide = x.to(kF32), r = inverse_rms(wide, 1, epsilon);
    const Mx mx = mx_quantise(normalised(wide, r, gamma, beta), y->scalar_type(),
                              {-1, 32, scale_alg, 0, 0, round_mode.empty() ? "rint" : round_mode});
    const at::Tensor bytes = mx.y.view(at::kByte);  // a block with infinity or NaN: 0, scale 255
    store_bytes(y, fp4() ? bytes : at::where(at::isnan(mx.y.to(kF32)), 0, bytes));
    store_bytes(mxscale, mx.scale);
    if (output_rstd) rstd = r;
  }
};

}  // namespace

NAMED(aclnnRmsNormDynamicQuant, NormInt8, all, check, run)
NAMED(aclnnRmsNormDynamicMxQuant, NormMx, all, check, run)
NAMED(aclnnAddRmsNormDynamicMxQuant, NormMx, added, check_added, run_added)

}  // namespace softnpu
