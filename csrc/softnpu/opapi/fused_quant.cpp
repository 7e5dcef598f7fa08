// Quantising operators. Tables: argument, its tensor, required, dtypes, ranks, source.
#include "fused_quant.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/round.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "fused_family.h"

namespace softnpu {

void store_quantised(In quotient, Out y) {
  const at::ScalarType type = y->scalar_type();
  if (type == kE4M3 || type == kE5M2) {
    y = saturated(quotient, type);  // "round" is the rounding of the cast: our reading
    return;
  }
  const double top = largest(type);
  const at::Tensor whole = at::round(quotient.nan_to_num(0.0)).clamp(-top - 1, top);
  if (type == at::kChar)
    y = whole;  // half to even: our reading
  else
    store_bytes(y, pack(whole));  // two to a byte, eight to an INT32
}

namespace {

// hicann/ops-nn quant/dynamic_quant_v2/docs/aclnnDynamicQuantV2.md (dtypes of y by chip,
// divisibility), quant/dynamic_quant/docs/aclnnDynamicQuantV4.md (ranks, group_index, modes; Ascend
// 950 only).
struct DynamicQuant {
  at::Tensor x, smooth_scales, group_index;
  DType_ dst_type;
  bool symmetrical;
  std::string quant_mode = "pertoken";
  float dst_type_max;
  Out y, scale, offset;
  FIELDS(v1, x, smooth_scales, y, scale)
  FIELDS(v2, x, smooth_scales, group_index, dst_type, y, scale, offset)
  FIELDS(v3, x, smooth_scales, group_index, dst_type, symmetrical, quant_mode, y, scale, offset)
  FIELDS(v4, x, smooth_scales, group_index, dst_type, symmetrical, quant_mode, dst_type_max, y,
         scale, offset)

  void check() const {
    check_table(
        {{"x", x, true, kHalves, 2, 8, kDocument},
         {"smooth_scales", smooth_scales, false, kHalves, 1, 2, kDocument},
         {"group_index", group_index, false, {at::kInt}, 1, 1, kDocument},
         {"y", *y, true, also_on_a5({at::kChar, at::kInt}, {kE4M3, kE5M2}), 2, 8, kDocument},
         {"scale", *scale, true, {kF32}, 1, 7, kDocument},
         {"offset", *offset, false, {kF32}, 1, 7, kDocument}});
    require(quant_mode == "pertoken" || quant_mode == "pertensor" || quant_mode == "perchannel",
            "quant_mode", quant_mode, "pertoken, pertensor or perchannel");
    require(!group_index.defined() || quant_mode == "pertoken", "group_index", show(group_index),
            "nothing unless the mode is pertoken");
    require(!group_index.defined() || smooth_scales.defined(), "smooth_scales", "nothing",
            "a row for each group of group_index");
    if (smooth_scales.defined()) {
      require(smooth_scales.scalar_type() == x.scalar_type(), "smooth_scales", show(smooth_scales),
              "the dtype of x");
      require(smooth_scales.dim() == (group_index.defined() ? 2 : 1) &&
                  smooth_scales.size(-1) == x.size(quant_mode == "perchannel" ? -2 : -1),
              "smooth_scales", show(smooth_scales),
              "the quantised dimension of x (and a row for each group)");
    }
    if (group_index.defined()) {
      require(smooth_scales.size(0) <= 1024, "smooth_scales", show(smooth_scales),
              "at most 1024 groups");
      require(group_index.size(0) == smooth_scales.size(0), "group_index", show(group_index),
              "an end for each row of smooth_scales");
      require(group_index.size(0) <= x.numel() / std::max<int64_t>(x.size(-1), 1), "group_index",
              show(group_index), "at most as many groups as rows of x");
    }
    if (y->scalar_type() == at::kInt)
      require(x.size(-1) % 8 == 0, "x", show(x),
              "a last dimension divisible by 8 for INT4 in INT32");
  }

  void check_v3() const {
    require_generation(kOnA5);
    check();
    require(symmetrical != static_cast<bool>(offset), "offset", show(*offset),
            "an offset only if it is not symmetrical");
  }

  void check_v4() const {
    check_v3();
    // It has a meaning for HIFLOAT8 only.
    require(dst_type_max >= 0 && dst_type_max <= 32768, "dst_type_max",
            std::to_string(dst_type_max), "0 to 32768");
  }

  at::Tensor smoothed() const {
    const at::Tensor wide = x.to(kF32);
    if (!smooth_scales.defined()) return wide;
    if (!group_index.defined())
      return wide.mul(quant_mode == "perchannel" ? smooth_scales.to(kF32).unsqueeze(-1)
                                                 : smooth_scales.to(kF32));
    // Row r belongs to the first group whose end is behind r.
    const at::Tensor rows = at::arange(x.numel() / x.size(-1), at::kInt);
    return wide.reshape({-1, x.size(-1)})
        .mul(
            smooth_scales.to(kF32).index_select(0, at::searchsorted(group_index, rows, true, true)))
        .view(x.sizes());
  }

  void run() const {
    if (x.numel() == 0) {
      scale = at::zeros(scale->sizes(), kF32);  // no documented value: our reading
      return;
    }
    const at::Tensor values = smoothed();
    std::vector<int64_t> axes = {quant_mode == "perchannel" ? -2 : -1};
    if (quant_mode == "pertensor") axes = {};
    const at::ScalarType type = y->scalar_type();
    const double top = largest(type);
    const bool integer = type != kE4M3 && type != kE5M2;
    const at::Tensor high = at::amax(values, axes, !axes.empty());
    const at::Tensor peak = at::amax(values.abs(), axes, !axes.empty());
    const at::Tensor range = offset ? high.sub(at::amin(values, axes, !axes.empty())) : peak;
    const at::Tensor s = scale_of(range, offset ? 2 * top + integer : top);
    at::Tensor quotient = over(values, s);
    const auto stored = [&](In v) { return axes.empty() ? v.reshape({1}) : v.squeeze(axes[0]); };
    if (offset) {
      const at::Tensor shift = over(high, s).neg().add(top);
      quotient = quotient.add(shift);
      offset = stored(shift);
    }
    scale = stored(s);
    store_quantised(quotient, y);
  }
};

// hicann/ops-nn quant/dynamic_mx_quant/docs/aclnnDynamicMxQuantV3.md. FLOAT4_E1M2 is not emulated.
struct MxQuant {
  at::Tensor x;
  int64_t axis;
  std::string round_mode;
  DType_ dst_type;
  int64_t block_size, scale_alg;
  double dst_type_max, max_low_bound;
  Out y, mxscale;
  FIELDS(all, x, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max, max_low_bound, y,
         mxscale)

  void check() const {
    require_generation(kOnA5, kWrongPlatform);
    check_table({{"x", x, true, kFloats, 1, 7, kDocument},
                 {"y", *y, true, {kE2M1, kE4M3, kE5M2}, 1, 7, kDocument},
                 {"mxscale", *mxscale, true, {kE8M0}, 2, 8, kDocument}});
    const bool fp4 = y->scalar_type() == kE2M1;
    require(axis >= -x.dim() && axis < x.dim(), "axis", text(axis), "a dimension of x");
    require(round_mode.empty() || round_mode == "rint" ||
                (fp4 && (round_mode == "floor" || round_mode == "round")),
            "round_mode", round_mode, fp4 ? "rint, floor or round" : "rint, as y is FLOAT8");
    require(block_size > 0 && block_size <= 1024 && block_size % 32 == 0, "block_size",
            text(block_size), "a multiple of 32 up to 1024");
    require(scale_alg == 0 || scale_alg == (fp4 ? 2 : 1), "scale_alg", text(scale_alg),
            fp4 ? "0 or 2, as y is FLOAT4_E2M1" : "0 or 1, as y is FLOAT8");
    require(scale_alg != 2 || block_size == 32, "block_size", text(block_size),
            "32, as scale_alg is 2");
    require(
        dst_type_max == 0 || (fp4 && block_size == 32 && dst_type_max >= 6 && dst_type_max <= 12),
        "dst_type_max", std::to_string(dst_type_max),
        "0, or 6 to 12 for FLOAT4_E2M1 with blocks of 32");
    require(max_low_bound == 0 || (scale_alg == 1 && max_low_bound > 0), "max_low_bound",
            std::to_string(max_low_bound), "0, or a positive value with scale_alg 1");
    require(!fp4 || x.size(-1) % 2 == 0, "x", show(x), "an even last dimension for FLOAT4");
    if (x.scalar_type() == kF32) {
      require(block_size == 32, "block_size", text(block_size), "32, as x is fp32");
      require(x.size(axis) >= 32, "x", show(x), "at least 32 values along the axis, as x is fp32");
    }
  }

  void run() const {
    if (x.numel() == 0) return;
    const Mx mx =
        mx_quantise(x, y->scalar_type(),
                    {axis, block_size, scale_alg, dst_type_max, max_low_bound, round_mode});
    store_bytes(y, mx.y.view(at::kByte));
    store_bytes(mxscale, mx.scale);
  }
};

// hicann/ops-nn quant/trans_quant_param_v2/docs/aclnnTransQuantParamV3.md
struct TransQuantParam {
  at::Tensor scale, offset;
  int64_t round_mode;
  Out out;
  FIELDS(all, scale, offset, round_mode, out)

  void check() const {
    check_table({{"scale", scale, true, {kF32}, 1, 2, kDocument},
                 {"offset", offset, false, {kF32}, 1, 2, kDocument},
                 {"out", *out, true, {at::kLong, at::kUInt64}, 1, 2, kDocument}});
    require(round_mode == 0 || round_mode == 1, "round_mode", text(round_mode), "0 or 1");
    require(scale.numel() > 0, "scale", show(scale), "no empty tensor");
    if (!offset.defined()) return;
    require(offset.numel() > 0, "offset", show(offset), "no empty tensor");
    require(scale.dim() == 2 ? offset.sizes() == scale.sizes() : offset.dim() == 1, "offset",
            show(offset), "one dimension, or the shape of a scale with two");
    require(scale.numel() == offset.numel() || scale.numel() == 1 || offset.numel() == 1, "offset",
            show(offset), "one value, or as many as scale");
  }

  void run() const {
    at::Tensor bits = scale.contiguous().view(at::kInt).to(at::kLong);
    // To the nearest of 19 bits, ties to even, before the low 13 are cut off.
    if (round_mode == 1)
      bits = bits.add(at::bitwise_and(bits.bitwise_right_shift(13), 1)).add(0xfff);
    at::Tensor packed = at::bitwise_and(bits, 0xffffe000).bitwise_or(int64_t{1} << 46);
    if (offset.defined()) {
      const at::Tensor shift = at::round(offset).clamp(-256, 255).to(at::kLong);
      packed = packed.bitwise_or(at::bitwise_and(shift, 0x1ff).bitwise_left_shift(37));
    }
    out = packed.to(out->scalar_type());
  }
};

}  // namespace

NAMED(aclnnDynamicQuant, DynamicQuant, v1, check, run)
NAMED(aclnnDynamicQuantV2, DynamicQuant, v2, check, run)
// torch_npu calls V4, and only where V3 exists too.
NAMED(aclnnDynamicQuantV3, DynamicQuant, v3, check_v3, run)
NAMED(aclnnDynamicQuantV4, DynamicQuant, v4, check_v4, run)
NAMED(aclnnDynamicMxQuantV3, MxQuant, all, check, run)
NAMED(aclnnTransQuantParamV3, TransQuantParam, all, check, run)

}  // namespace softnpu
