// RMS norms of a sum, by 1 + gamma, and with quantisation by given scales. Tables: argument, its
// tensor, required, dtypes, ranks, source.
#include "fused_family.h"
#include "fused_norm.h"

namespace softnpu {
namespace {

void require_last_axes(In x, In gamma) {
  const bool fits = gamma.dim() <= x.dim() &&
                    x.sizes().slice(static_cast<size_t>(x.dim() - gamma.dim())) == gamma.sizes();
  require(fits, "gamma", show(gamma), "the shape of the last dimensions of x");
}

void require_like_gamma(const char* argument, In x, In gamma) {
  require(!x.defined() || x.sizes() == gamma.sizes(), argument, show(x), "the shape of gamma");
}

// mirror-cann/ops-nn norm/gemma_rms_norm/docs/aclnnGemmaRmsNorm.md
struct GemmaNorm {
  at::Tensor x, gamma;
  double epsilon;
  Out y, rstd;
  FIELDS(all, x, gamma, epsilon, y, rstd)

  void check() const {
    const auto type = x.defined() ? x.scalar_type() : kNone;
    check_table({{"x", x, true, kFloats, 1, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 8, kDocument},
                 {"yOut", *y, true, {type}, 1, 8, kDocument},
                 {"rstdOut", *rstd, true, {kF32}, 1, 8, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [this] { require_last_axes(x, gamma); });
  }

  void run() const {
    const at::Tensor wide = x.to(kF32), r = inverse_rms(wide, gamma.dim(), epsilon);
    y = normalised(wide, r, gamma.to(kF32).add(1), {});
    if (rstd->numel()) rstd = r.reshape(rstd->sizes());
  }
};

// mirror-cann/ops-nn norm/inplace_add_rms_norm/docs/aclnnInplaceAddRmsNorm.md: the norm replaces
// x1, the sum x2.
struct InplaceNorm {
  Out x1, x2;
  at::Tensor gamma;
  double epsilon;
  Out rstd;
  FIELDS(all, x1, x2, gamma, epsilon, rstd)

  void check() const {
    const auto type = x1->defined() ? x1->scalar_type() : kNone;
    check_table({{"x1Ref", *x1, true, kFloats, 1, 8, kDocument},
                 {"x2Ref", *x2, true, {type}, 1, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 8, kDocument},
                 {"rstdOut", *rstd, true, {kF32}, 1, 8, kDocument}});
    require(x2->sizes() == x1->sizes(), "x2Ref", show(*x2), "the shape of x1Ref");
    require_last_axes(*x1, gamma);
  }

  void run() const {
    // Rounded before it is normalised, as aclnnAddRmsNorm does here: our reading.
    const at::Tensor sum = x1->to(kF32).add(x2->to(kF32)).to(x1->scalar_type());
    const at::Tensor wide = sum.to(kF32), r = inverse_rms(wide, gamma.dim(), epsilon);
    x2 = sum;
    x1 = normalised(wide, r, gamma, {});
    rstd = r;
  }
};

struct QuantRow {  // dtypes that the pages allow together
  Types x, scale, offset;
};
const std::vector<QuantRow>& quant_rows() {
  static const std::vector<QuantRow> before_a5 = {{{kF16}, {kF32}, {kNone, kI32}},
                                                  {{kBF16}, {kBF16}, {kNone, kBF16}}};
  // The page pairs int32 with fp32 scales of 16-bit x only; torch_npu's own tests use it in all
  // rows.
  static const std::vector<QuantRow> a5 = {{kHalves, {kF32}, {kNone, kI32, kF32}},
                                           {{kF32}, {kF32}, {kNone, kI32, kF32}},
                                           {{kF16}, {kF16}, {kNone, kI32, kF16}},
                                           {{kBF16}, {kBF16}, {kNone, kI32, kBF16}}};
  return on_a5() ? a5 : before_a5;
}
at::ScalarType type_of(In x) { return x.defined() ? x.scalar_type() : kNone; }

at::Tensor quotient(In y, In scale, In offset, bool divide) {
  const at::Tensor s = scale.to(kF32), q = divide ? y.div(s) : y.mul(s);
  return offset.defined() ? q.add(offset.to(kF32)) : q;
}

// mirror-cann/ops-nn norm/add_rms_norm_quant/docs/aclnnAddRmsNormQuant.md and ...V2.md. HIFLOAT8 is
// not emulated.
struct SumQuant {
  at::Tensor x1, x2, gamma, scales1, scales2, zero_points1, zero_points2, beta;
  int64_t axis;
  double epsilon;
  bool div_mode;
  Out y1, y2, sum, norm;
  FIELDS(v1, x1, x2, gamma, scales1, scales2, zero_points1, zero_points2, axis, epsilon, div_mode,
         y1, y2, sum)
  FIELDS(v2, x1, x2, gamma, scales1, scales2, zero_points1, zero_points2, beta, axis, epsilon,
         div_mode, y1, y2, sum, norm)

  void check_dtypes() const {
    std::vector<const QuantRow*> rows;
    for (const QuantRow& row : quant_rows()) rows.push_back(&row);
    narrow(rows, "x1", type_of(x1), show(x1), &QuantRow::x);
    narrow(rows, "scales1", type_of(scales1), show(scales1), &QuantRow::scale);
    const std::string found = zero_points1.defined() ? show(zero_points1) : "nothing";
    narrow(rows, "zeroPoints1", type_of(zero_points1), found, &QuantRow::offset);
  }

  void check() const {
    const auto type = type_of(x1), scale = type_of(scales1);
    const Types results = also_on_a5({kI8}, {kE4M3, kE5M2}), any = {kI32, kF32, kF16, kBF16};
    check_table({{"x1", x1, true, kFloats, 1, 8, kDocument},
                 {"x2", x2, true, {type}, 1, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 8, kDocument},
                 {"scales1", scales1, true, kFloats, 1, 8, kDocument},
                 {"scales2", scales2, false, {scale}, 1, 8, kDocument},
                 {"zeroPoints1", zero_points1, false, any, 1, 8, kDocument},
                 {"zeroPoints2", zero_points2, false, any, 1, 8, kDocument},
                 {"beta", beta, false, kFloats, 1, 8, kDocument},
                 {"y1Out", *y1, true, results, 1, 8, kDocument},
                 {"y2Out", *y2, false, results, 1, 8, kDocument},
                 {"xOut", *sum, true, {type}, 1, 8, kDocument},
                 {"rmsNormOut", *norm, false, {type}, 1, 8, kDocument}});
    check_dtypes();
    require(x2.sizes() == x1.sizes(), "x2", show(x2), "the shape of x1");
    require(y1->sizes() == x1.sizes(), "y1Out", show(*y1), "the shape of x1");
    require_last_axes(x1, gamma);
    for (const auto& [name, x] : {std::pair("scales1", scales1),
                                  {"scales2", scales2},
                                  {"zeroPoints1", zero_points1},
                                  {"zeroPoints2", zero_points2},
                                  {"beta", beta}})
      require_like_gamma(name, x, gamma);
    require(on_a5() || div_mode, "divMode", "false", "true on this chip");
  }

  void run() const {
    const at::Tensor wide = x1.to(kF32).add(x2.to(kF32));
    sum = wide;
    // fp16 is added in fp16, bf16 with a beta rounded before the norm (both read).
    const bool rounded = !on_a5() && (x1.scalar_type() == kF16 || beta.defined());
    const at::Tensor x = rounded ? wide.to(x1.scalar_type()).to(kF32) : wide;
    const at::Tensor plain = normalised(x, inverse_rms(x, gamma.dim(), epsilon), gamma, {});
    if (norm) norm = plain;
    const at::Tensor y = beta.defined() ? plain.add(beta.to(kF32)) : plain;
    store_quantised(quotient(y, scales1, zero_points1, div_mode), y1);
    if (scales2.defined())
      store_quantised(quotient(y, scales2, zero_points2, div_mode), y2);
    else if (on_a5() && y2)  // without scales: y itself, as torch_npu's own tests expect
      store_quantised(y, y2);
  }
};

// mirror-cann/ops-nn norm/rms_norm_quant/docs/aclnnRmsNormQuant.md, norm/rms_norm_quant_v3/docs/
// aclnnRmsNormQuantV3.md (Ascend 950). HIFLOAT8 is not emulated.
struct ScaledQuant {
  at::Tensor x, gamma, beta, scale, offset;
  double epsilon;
  bool div_mode = true, output_rstd = false;
  Out y, rstd;
  FIELDS(v1, x, gamma, beta, scale, offset, epsilon, y)
  FIELDS(v3, x, gamma, scale, offset, beta, epsilon, div_mode, output_rstd, y, rstd)

  void check_all(bool optional) const {
    const auto type = type_of(x);
    const Types results = also_on_a5({kI8, kI4}, {kI32, kE4M3, kE5M2});
    const Types scales = on_a5() ? Types{type, kF32} : Types{type};
    const Types offsets = on_a5() ? Types{kI8, kI32, type, kF32} : Types{kI8};
    check_table({{"x", x, true, on_a5() ? kFloats : kHalves, 1, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 2, kDocument},
                 {"beta", beta, !optional, {type}, 1, 2, kDocument},
                 {"scale", scale, true, scales, 1, 1, kDocument},
                 {"offset", offset, !optional, offsets, 1, 1, kDocument},
                 {"y", *y, true, results, 1, 8, kDocument}});
    const int64_t width = x.size(-1);
    require(gamma.numel() == width, "gamma", show(gamma), "the last dimension of x");
    require(!beta.defined() || beta.numel() == width, "beta", show(beta),
            "the last dimension of x");
    for (const auto& [name, v] : {std::pair("scale", scale), {"offset", offset}})
      require(!v.defined() || v.numel() == 1 || v.numel() == width, name, show(v),
              "one value, or the last dimension of x");
  }

  void check() const { check_all(false); }

  void check_v3() const {
    require_generation(kOnA5);
    check_all(true);
  }

  void run() const {
    const at::Tensor wide = x.to(kF32), r = inverse_rms(wide, 1, epsilon);
    const at::Tensor row = gamma.reshape({-1}),
                     shift = beta.defined() ? beta.reshape({-1}) : at::Tensor();
    store_quantised(quotient(normalised(wide, r, row, shift), scale, offset, div_mode), y);
    if (output_rstd) rstd = r;
  }
};

// mirror-cann/ops-nn norm/add_rms_norm_dynamic_quant/docs/aclnnAddRmsNormDynamicQuantV2.md
struct SumDynamicQuant {
  at::Tensor x1, x2, gamma, smooth1, smooth2, beta;
  double epsilon;
  std::vector<bool> mask;
  Out y1, y2, sum, scale1, scale2;
  FIELDS(all, x1, x2, gamma, smooth1, smooth2, beta, epsilon, mask, y1, y2, sum, scale1, scale2)

  bool first() const { return mask.empty() || mask[0]; }
  bool second() const { return mask.empty() ? smooth1.defined() && smooth2.defined() : mask[1]; }

  void check() const {
    const auto type = type_of(x1);
    const Types results = also_on_a5({kI8, kI32, kI4}, {kE4M3, kE5M2});
    check_table({{"x1", x1, true, kHalves, 2, 8, kDocument},
                 {"x2", x2, true, {type}, 2, 8, kDocument},
                 {"gamma", gamma, true, {type}, 1, 1, kDocument},
                 {"smoothScale1", smooth1, false, {type}, 1, 1, kDocument},
                 {"smoothScale2", smooth2, false, {type}, 1, 1, kDocument},
                 {"beta", beta, false, {type}, 1, 1, kDocument},
                 {"y1Out", *y1, first(), results, 0, 8, kDocument},
                 {"y2Out", *y2, second(), results, 0, 8, kDocument},
                 {"xOut", *sum, true, {type}, 2, 8, kDocument},
                 {"scale1Out", *scale1, first(), {kF32}, 0, 8, kDocument},
                 {"scale2Out", *scale2, second(), {kF32}, 0, 8, kDocument}});
    require(mask.empty() || mask.size() == 2, "outputMask", text(static_cast<int64_t>(mask.size())),
            "two values, or none");
    require(x2.sizes() == x1.sizes(), "x2", show(x2), "the shape of x1");
    require_last_axes(x1, gamma);
    for (const auto& [name, x] :
         {std::pair("smoothScale1", smooth1), {"smoothScale2", smooth2}, {"beta", beta}})
      require_like_gamma(name, x, gamma);
    const auto rows = outer_sizes(x1, 1);
    if (first()) require_sizes("scale1Out", *scale1, rows);
    if (second()) require_sizes("scale2Out", *scale2, rows);
  }

  static void quantise(In input, const Out& y, const Out& scale) {
    const at::Tensor s = scale_of(input.abs().amax({-1}), largest(y->scalar_type()));
    store_quantised(over(input, s.unsqueeze(-1)), y);
    scale = s;
  }

  void run() const {
    const at::Tensor x = x1.to(kF32).add(x2.to(kF32));
    sum = x;
    const at::Tensor y = normalised(x, inverse_rms(x, 1, epsilon), gamma, beta);
    const auto smoothed = [&](In s) { return s.defined() ? y.mul(s.to(kF32)) : y; };
    if (first()) quantise(smoothed(smooth1), y1, scale1);
    if (second()) quantise(smoothed(smooth2), y2, scale2);
  }
};

}  // namespace

NAMED(aclnnGemmaRmsNorm, GemmaNorm, all, check, run)
NAMED(aclnnInplaceAddRmsNorm, InplaceNorm, all, check, run)
NAMED(aclnnAddRmsNormQuant, SumQuant, v1, check, run)
NAMED(aclnnAddRmsNormQuantV2, SumQuant, v2, check, run)
NAMED(aclnnRmsNormQuant, ScaledQuant, v1, check, run)
NAMED(aclnnRmsNormQuantV3, ScaledQuant, v3, check_v3, run)
NAMED(aclnnAddRmsNormDynamicQuantV2, SumDynamicQuant, all, check, run)

}  // namespace softnpu
