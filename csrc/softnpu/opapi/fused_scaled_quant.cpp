// Quantisation by given scales and its inverse; SwiGLU before a quantisation by groups of rows.
// Tables: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/round.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/silu.h>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

// `values` has one value, that of the axis, or x's rank.
at::Tensor along(In values, In x, int64_t axis) {
  const at::Tensor wide = values.to(kF32);
  if (values.numel() == 1) return wide.reshape({});
  if (values.dim() == x.dim()) return wide;
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()), 1);
  sizes[static_cast<size_t>(axis < 0 ? axis + x.dim() : axis)] = values.numel();
  return wide.reshape(sizes);
}

bool fits(In values, In x, int64_t axis) {
  if (!values.defined() || values.numel() == 1) return true;
  return axis >= -x.dim() && axis < x.dim() && values.numel() == x.size(axis);
}

at::Tensor rounded(In x, const std::string& mode) {
  if (mode == "floor") return x.floor();
  if (mode == "ceil") return x.ceil();
  if (mode == "trunc") return x.trunc();
  return x;  // "round": the rounding of the store
}

// mirror-cann/ops-nn quant/ascend_quant_v2/docs/aclnnAscendQuant.md and aclnnAscendQuantV3.md.
// HIFLOAT8 is not emulated.
struct AscendQuant {
  at::Tensor x, scale, offset;
  bool sqrt_mode;
  std::string round_mode;
  int dst_type, axis = -1;
  Out y;
  FIELDS(v1, x, scale, offset, sqrt_mode, round_mode, dst_type, y)
  FIELDS(v3, x, scale, offset, sqrt_mode, round_mode, dst_type, axis, y)

  void check() const {
    const auto type = x.defined() ? x.scalar_type() : kNone;
    const Types scales = {type, kF32};
    check_table({{"x", x, true, kFloats, 1, 8, kDocument},
                 {"scale", scale, true, scales, 1, 8, kDocument},
                 {"offset", offset, false, scales, 1, 8, kDocument},
                 {"y", *y, true, also_on_a5({kI8, kI32, kI4}, {kE4M3, kE5M2}), 1, 8, kDocument}});
    require(axis == -1 || axis == -2, "axis", text(axis), "-1 or -2");
    require(x.dim() >= -axis && fits(scale, x, axis), "scale", show(scale),
            "one value, or the size of x at the axis");
    require(!offset.defined() || offset.sizes() == scale.sizes(), "offset", show(offset),
            "the shape of scale");
    require(round_mode == "round" || round_mode == "floor" || round_mode == "ceil" ||
                round_mode == "trunc",
            "roundMode", round_mode, "round, floor, ceil or trunc");
    require(y->scalar_type() != kI32 || x.size(-1) % 8 == 0, "x", show(x),
            "a last dimension divisible by 8 for INT4 in INT32");
  }

  void run() const {
    const at::Tensor s = along(scale, x, axis);
    at::Tensor result = x.to(kF32).mul(s);
    if (sqrt_mode) result = result.mul(s);
    if (offset.defined()) result = result.add(along(offset, x, axis));
    store_quantised(rounded(result, round_mode), y);
  }
};

// mirror-cann/ops-nn quant/quantize/docs/aclnnQuantize.md
struct Quantize {
  at::Tensor x, scales, zero_points;
  DType_ dtype;
  int axis;
  Out out;
  FIELDS(all, x, scales, zero_points, dtype, axis, out)

  void check() const {
    const Types results = also_on_a5({kI8, at::kByte, kI32}, {kE4M3, kE5M2});
    const Types points = {kI32, kI8, at::kByte, kF32, kBF16};
    check_table({{"x", x, true, kFloats, 1, 8, kDocument},
                 {"scales", scales, true, {kF32, kBF16}, 1, 1, kDocument},
                 {"zeroPoints", zero_points, false, points, 1, 1, kDocument},
                 {"out", *out, true, results, 1, 8, kDocument}});
    require(fits(scales, x, axis), "scales", show(scales),
            "one value, or the size of x at the axis");
    require(!zero_points.defined() || zero_points.sizes() == scales.sizes(), "zeroPoints",
            show(zero_points), "the shape of scales");
    require(out->sizes() == x.sizes(), "out", show(*out), "the shape of x");
  }

  void run() const {
    at::Tensor result = x.to(kF32).div(along(scales, x, axis));
    const at::Tensor points = zero_points.defined() ? along(zero_points, x, axis) : at::Tensor();
    const auto type = out->scalar_type();
    if (type == kE4M3 || type == kE5M2) {
      out = saturated(points.defined() ? result.add(points) : result, type);
      return;
    }
    // Rounded before the zero point, a whole number, is added: half to even of x / scale.
    result = at::round(result.to(at::kDouble));
    if (points.defined()) result = result.add(points);
    const double low = type == kI8 ? -128 : type == kI32 ? -2147483648.0 : 0;
    const double high = type == kI8 ? 127 : type == kI32 ? 2147483647.0 : 255;
    out = result.nan_to_num(0.0).clamp(low, high);
  }
};

// mirror-cann/ops-nn experimental/quant/ascend_anti_quant_v2/docs/aclnnAscendAntiQuant.md
struct AntiQuant {
  at::Tensor x, scale, offset;
  int64_t dst_type;
  bool sqrt_mode;
  Out y;
  FIELDS(all, x, scale, offset, dst_type, sqrt_mode, y)

  void check() const {
    check_table({{"x", x, true, also_on_a5({kI8, kI32, kI4}, {kE4M3, kE5M2}), 1, 8, kDocument},
                 {"scale", scale, true, {kF32, kBF16}, 1, 1, kDocument},
                 {"offset", offset, false, {kF32, kBF16}, 1, 1, kDocument},
                 {"y", *y, true, kHalves, 1, 8, kDocument}});
    require(fits(scale, *y, -1), "scale", show(scale), "one value, or the last dimension of y");
    require(!offset.defined() || offset.sizes() == scale.sizes(), "offset", show(offset),
            "the shape of scale");
  }

  void run() const {
    const bool packed = x.scalar_type() == kI32 || x.scalar_type() == kI4;
    at::Tensor wide = packed ? int4_values(x).to(kF32).reshape(y->sizes()) : x.to(kF32);
    if (offset.defined()) wide = wide.add(offset.to(kF32));
    const at::Tensor s = scale.to(kF32);
    y = sqrt_mode ? wide.mul(s).mul(s) : wide.mul(s);
  }
};

// mirror-cann/ops-nn quant/swi_glu_quant/docs/aclnnSwiGluQuantV2.md. Rows of no group are not
// written.
struct SwiGluInt8 {
  at::Tensor x, smooth_scales, offsets, group_index;
  bool activate_left;
  std::string mode;
  int64_t group_type, dst_type;
  Out y, scale;
  FIELDS(all, x, smooth_scales, offsets, group_index, activate_left, mode, group_type, dst_type, y,
         scale)

  bool dynamic() const { return mode == "dynamic"; }
  double top() const { return dst_type == 29 ? 7 : 127; }

  void check() const {
    check_table({{"x", x, true, kFloats, 2, 8, kDocument},
                 {"smoothScales", smooth_scales, !dynamic(), {kF32}, 1, 2, kDocument},
                 {"offsets", offsets, !dynamic(), {kF32}, 1, 2, kDocument},
                 {"groupIndex", group_index, false, {kI32}, 1, 1, kDocument},
                 {"yOut", *y, true, {kI8, kI4}, 2, 8, kDocument},
                 {"scaleOut", *scale, dynamic(), {kF32}, 1, 7, kDocument}});
    require(x.size(-1) % 2 == 0 && x.size(-1) <= 8192, "x", show(x),
            "an even last dimension up to 8192");
    require(dynamic() || mode == "static", "quantMode", mode, "static or dynamic");
    require(group_type == 0 || group_type == 1, "groupListType", text(group_type), "0 or 1");
    require(dst_type == 2 || dst_type == 29, "dstType", text(dst_type), "2 (INT8) or 29 (INT4)");
    require(!group_index.defined() || smooth_scales.defined(), "smoothScales", "nothing",
            "a row for each group");
    require(!group_index.defined() || smooth_scales.size(0) == group_index.size(0), "smoothScales",
            show(smooth_scales), "a row for each group");
  }

  at::Tensor ends() const { return group_type == 0 ? group_index : group_index.cumsum(0).to(kI32); }

  // The values of each row's group: [rows, width or 1].
  at::Tensor of_rows(In table, int64_t rows) const {
    if (!group_index.defined()) return table.reshape({1, -1});
    const at::Tensor group =
        at::searchsorted(ends().contiguous(), at::arange(rows, kI32), false, true);
    return table.reshape({table.size(0), -1}).index_select(0, group);
  }

  void run() const {
    const auto parts = x.to(kF32).reshape({-1, x.size(-1)}).chunk(2, -1);
    const auto& gate = parts[activate_left ? 0 : 1];
    const auto& linear = parts[activate_left ? 1 : 0];
    int64_t rows = gate.size(0);
    if (group_index.defined()) {
      const at::Tensor last = ends().slice(0, -1);
      expect_values(last, 0, rows + 1, "groupIndex");
      rows = last.item<int64_t>();
    }
    at::Tensor values = at::silu(gate).mul(linear).slice(0, 0, rows);
    if (smooth_scales.defined()) values = values.mul(of_rows(smooth_scales, rows));
    if (offsets.defined() && !dynamic()) values = values.add(of_rows(offsets, rows));
    if (dynamic()) {
      const at::Tensor by = at::amax(values.abs(), {-1}).reciprocal().mul(top());
      values = values.mul(by.unsqueeze(-1));
      scale.touch();
      scale->view({-1}).slice(0, 0, rows).copy_(by);
    }
    const at::Tensor whole = at::round(values.nan_to_num(0.0)).clamp(-top() - 1, top());
    y.touch();
    const at::Tensor bytes = y->view(at::kByte);
    bytes.view({-1, bytes.size(-1)})
        .slice(0, 0, rows)
        .copy_(dst_type == 29 ? pack(whole) : whole.to(kI8).view(at::kByte));
  }
};

}  // namespace

NAMED(aclnnAscendQuant, AscendQuant, v1, check, run)
NAMED(aclnnAscendQuantV3, AscendQuant, v3, check, run)
NAMED(aclnnQuantize, Quantize, all, check, run)
NAMED(aclnnAscendAntiQuant, AntiQuant, all, check, run)
NAMED(aclnnSwiGluQuantV2, SwiGluInt8, all, check, run)

}  // namespace softnpu
