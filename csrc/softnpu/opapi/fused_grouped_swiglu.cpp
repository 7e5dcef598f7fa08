// npu_grouped_matmul_swiglu_quant and _v2: a grouped product, swiglu of its halves, and the
// quantised result. mirror-cann ops-transformer:
// gmm/grouped_matmul_swiglu_quant/docs/aclnnGroupedMatmulSwigluQuantWeightNZ.md,
// gmm/grouped_matmul_swiglu_quant_v2/docs/aclnnGroupedMatmulSwigluQuantV2.md,
// aclnnGroupedMatmulSwigluQuantWeightNzV2.md
#include <ATen/ops/amax.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "fused_grouped.h"
#include "fused_quant.h"

namespace softnpu::grouped {
namespace {

struct SwigluCall {
  Matrix x;
  std::vector<Matrix> weight;
  std::vector<at::Tensor> scale, assist;
  at::Tensor bias, x_scale, smooth, list;
  int64_t dequant_mode, dequant_dtype, quant_mode, list_type;
  std::vector<int64_t> tuning;
  Out out, out_scale;
  FIELDS(all, x, weight, scale, assist, bias, x_scale, smooth, list, dequant_mode, dequant_dtype,
         quant_mode, list_type, tuning, out, out_scale)

  int64_t rows() const { return x.size(0); }
  int64_t depth() const { return x.size(1); }
  int64_t columns() const { return weight[0].size(-1); }
  int64_t groups() const {
    return together() ? weight[0].size(0) : static_cast<int64_t>(weight.size());
  }
  bool together() const { return weight[0].dim() == 3; }
  bool mx() const { return x_scale.scalar_type() == kE8M0; }
  SwigluCall opened() const {
    SwigluCall result = *this;
    result.x = x.as_int4();
    for (Matrix& one : result.weight) one = one.as_int4();
    return result;
  }
  void check() const;
  void run() const;
};

// Combinations: chips, layouts, x, weight, weight_scale, x_scale, output, assist matrix, smooth
// scale.
struct SwigluForm {
  unsigned where, layouts;
  Types x, weight, scale, x_scale, out;
  bool assist, smooth;
};
const std::vector<SwigluForm>& swiglu_forms() {
  const Types packed = {at::kUInt64, at::kLong}, fp8 = {kE4M3, kE5M2};
  // clang-format off
  static const std::vector<SwigluForm> table = {
      {kOnA2 | kOnA3, kNz, {kI8}, {kI8}, {kF32, kF16, kBF16}, {kF32}, {kI8}, false, false},
      {kOnA2 | kOnA3, kNd | kNz, {kI8}, {kI4}, packed, {kF32}, {kI8}, true, false},
      {kOnA2 | kOnA3, kNd | kNz, {kI4}, {kI4}, packed, {kF32}, {kI8}, false, true},
      {kOnA5, kNd, fp8, fp8, {kE8M0}, {kE8M0}, fp8, false, false},
      {kOnA5, kNz, {kE4M3}, {kE4M3}, {kE8M0}, {kE8M0}, {kE4M3}, false, false},
      {kOnA5, kNd, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, {kE2M1, kE4M3, kE5M2}, false, false},
      {kOnA5, kNz, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, {kE2M1, kE4M3}, false, false},
      {kOnA5, kNz, {kE4M3}, {kE2M1}, {kE8M0}, {kE8M0}, {kE4M3}, false, false},
      {kOnA5, kNd, fp8, fp8, {kF32, kBF16}, {kF32}, fp8, false, false},
      {kOnA5, kNd, {kI8}, {kI8}, {kF32, kBF16, kF16}, {kF32}, {kI8}, false, false},
  };
  // clang-format on
  return table;
}

const SwigluForm& swiglu_form(const SwigluCall& call) {
  auto rows = rows_here(swiglu_forms(), call.weight[0].nz);
  narrow(rows, "x", call.x.dtype, show(call.x), &SwigluForm::x);
  narrow(rows, "weight", call.weight[0].dtype, show(call.weight[0]), &SwigluForm::weight);
  narrow(rows, "weight_scale", call.scale[0].scalar_type(), show(call.scale[0]),
         &SwigluForm::scale);
  narrow(rows, "x_scale", call.x_scale.scalar_type(), show(call.x_scale), &SwigluForm::x_scale);
  narrow(rows, "output", call.out->scalar_type(), show(*call.out), &SwigluForm::out);
  return *rows.front();
}

void check_swiglu_modes(const SwigluCall& call) {
  const bool a5 = on_a5();
  require(call.list_type == 0 || call.list_type == 1, "group_list_type", text(call.list_type),
          "0 or 1");
  if (!a5) {
    const bool int8 = call.weight[0].dtype == kI8;
    require(call.dequant_mode == 0 || (call.dequant_mode == 1 && !int8), "dequant_mode",
            text(call.dequant_mode), int8 ? "0" : "0 or 1");
    const bool parts = call.scale[0].dim() == (call.together() ? 3 : 2);
    require(int8 || parts == (call.dequant_mode == 1), "dequant_mode", text(call.dequant_mode),
            "0 for scales of columns, 1 for scales of groups");
    require(call.columns() <= 10240, "weight", show(call.weight[0]), "N at most 10240");
    require(call.depth() < (int8 ? 65536 : 20000), "x", show(call.x),
            int8 ? "K below 65536" : "K below 20000");
    return;
  }
  const int64_t mode = call.mx() ? 2 : 0;
  require(call.dequant_mode == mode, "dequant_mode", text(call.dequant_mode),
          call.mx() ? "2 (MX)" : "0");
  require(call.quant_mode == mode, "quant_mode", text(call.quant_mode), call.mx() ? "2 (MX)" : "0");
  const int64_t dtype = call.dequant_dtype;
  require(dtype == 0 || (!call.mx() && (dtype == 1 || dtype == 27)), "dequant_dtype", text(dtype),
          call.mx() ? "fp32" : "fp32, fp16 or bf16");
  require(call.groups() <= 1024, "group_list", show(call.list), "at most 1024 groups");
}

void check_swiglu_shapes(const SwigluCall& call, const SwigluForm& form) {
  const int64_t k = call.depth(), n = call.columns(), m = call.rows();
  for (size_t i = 0; i < call.weight.size(); ++i) {
    const Matrix& w = call.weight[i];
    require(w.dim() == (call.weight.size() == 1 ? 3 : 2) || w.dim() == 2, "weight", show(w),
            "[groups, K, N]");
    require(w.size(-2) == k && w.size(-1) == n, "weight", show(w), "K of x and one N");
    require(w.dtype == call.weight[0].dtype && w.nz == call.weight[0].nz, "weight", show(w),
            "one dtype and format");
  }
  require(call.scale.size() == call.weight.size(), "weight_scale", "another number",
          "one for each weight");
  const auto each = [&](std::vector<int64_t> shape) {
    if (call.together()) shape.insert(shape.begin(), call.groups());
    return shape;
  };
  for (const at::Tensor& scale : call.scale) {
    if (call.mx()) {
      require_shape("weight_scale", scale, {each({ceil_div(k, 64), n, 2})});
      continue;
    }
    const bool parts = call.weight[0].dtype == kI4 && call.dequant_mode == 1;
    const int64_t count = parts ? scale.size(-2) : 1;
    require_shape("weight_scale", scale, {parts ? each({count, n}) : each({n})});
    require(k % count == 0, "weight_scale", show(scale), "groups that divide K");
  }
  require_shape(
      "x_scale", call.x_scale,
      {call.mx() ? std::vector<int64_t>{m, ceil_div(k, 64), 2} : std::vector<int64_t>{m}});
  if (form.assist) {
    require(given(call.assist) && call.assist.size() == call.weight.size(), "weight_assist_matrix",
            "nothing", "[groups, N]");
    for (const at::Tensor& one : call.assist) {
      require(one.scalar_type() == kF32, "weight_assist_matrix", show(one), "fp32");
      require_shape("weight_assist_matrix", one, {each({n})});
    }
  } else {
    require(!given(call.assist), "weight_assist_matrix", "a tensor", "nothing (int8 by int4 only)");
  }
  if (call.smooth.defined() && call.smooth.numel()) {
    require(form.smooth && call.smooth.scalar_type() == kF32, "smooth_scale", show(call.smooth),
            "nothing (int4 by int4 only)");
    require_shape("smooth_scale", call.smooth, {{call.groups()}, {call.groups(), n / 2}});
  }
  if (!call.mx()) return;
  const int64_t step =
      call.weight[0].nz ? (call.x.dtype == kE2M1 ? 128 : 64) : (call.x.dtype == kE2M1 ? 4 : 2);
  require(n % step == 0, "weight", show(call.weight[0]),
          "N a multiple of 2 (FP4: 4; NZ: 64, FP4 128)");
  require(call.x.dtype != kE2M1 || (k % 2 == 0 && k > 2), "x", show(call.x), "an even K above 2");
  if (call.weight[0].dtype == kE2M1 && call.x.dtype != kE2M1) {
    require(k % 32 == 0 && n >= 128, "weight", show(call.weight[0]),
            "K a multiple of 32, N at least 128");
    require(call.weight[0].transposed, "weight", "a tensor that is not transposed",
            "a transposed one");
  }
}

void check_swiglu(const SwigluCall& call) {
  require(!call.weight.empty() && !call.scale.empty(), "weight", "nothing", "a tensor");
  check_table({{"x_scale", call.x_scale, true, {kF32, kE8M0}, 1, 3, Source::kDocument},
               {"group_list", call.list, true, {at::kLong}, 1, 1, Source::kDocument}});
  require(!call.bias.defined(), "bias", show(call.bias), "nothing (reserved)");
  require(call.x.dim() == 2, "x", show(call.x), "[M, K]");
  require(call.weight[0].dim() >= 2, "weight", show(call.weight[0]),
          "[groups, K, N], or several of [K, N]");
  require(on_a5() || (call.rows() > 0 && call.columns() > 0), "x", show(call.x), "no empty tensor");
  const SwigluForm& form = swiglu_form(call);
  check_swiglu_modes(call);
  require(call.list.size(0) == call.groups(), "group_list", show(call.list),
          "one group for each weight");
  require(call.columns() % 2 == 0, "weight", show(call.weight[0]), "an even N");
  check_swiglu_shapes(call, form);
}

// FP8 or FP4 with one power of two for each 32 values. The exponent is rounded down as the format's
// standard has it (our reading: the document's brackets differ).
void store_mx(const SwigluCall& call, In y, int64_t start, int64_t end) {
  const auto dtype = call.out->scalar_type();
  const Mx mx = mx_quantise(y, dtype, {});
  call.out_scale->slice(0, start, end).view(at::kByte).copy_(mx.scale);
  const at::Tensor target = call.out->slice(0, start, end);
  (dtype == kE2M1 ? target.view(at::kByte) : target).copy_(mx.y);
}

void store_rows(const SwigluCall& call, In y, int64_t start, int64_t end) {
  const auto dtype = call.out->scalar_type();
  const double top = largest(dtype);
  const at::Tensor scale = at::amax(y.abs(), {-1}).div(top);
  call.out_scale->slice(0, start, end).copy_(scale);
  const at::Tensor divisor = scale.unsqueeze(-1);
  at::Tensor q = at::where(divisor.eq(0), at::zeros({}, kF32), y.div(divisor)).clamp(-top, top);
  call.out->slice(0, start, end).copy_(dtype == kI8 ? at::round(q) : q);
}

at::Tensor by_groups(In x, In weight, In scale) {  // [K, N] by a scale of [N] or [parts, N]
  const int64_t parts = scale.dim() == 2 ? scale.size(0) : 1, length = x.size(-1) / parts;
  at::Tensor sum = at::zeros({x.size(0), weight.size(1)}, kF32);
  for (int64_t i = 0; i < parts; ++i)
    sum.add_(product(x.narrow(-1, i * length, length), weight.narrow(0, i * length, length))
                 .to(kF32)
                 .mul(scale.dim() == 2 ? scale[i] : scale));
  return sum;
}

at::Tensor dequantised(const SwigluCall& call, In x, const Group& group) {
  const auto expert = static_cast<size_t>(group.expert);
  const at::Tensor weight =
      call.together() ? call.weight[0][group.expert].read() : call.weight[expert].read();
  const at::Tensor scale = call.together() ? call.scale[0][group.expert] : call.scale[expert];
  const at::Tensor mine = call.x_scale.slice(0, group.start, group.end);
  if (call.mx()) {
    const int64_t k = call.depth();
    return product(x.to(kF32).mul(stretch(mx_rows(mine), 32, 1, k)),
                   weight.to(kF32).mul(stretch(mx_columns(scale), 32, 0, k)));
  }
  if (!given(call.assist)) return by_groups(x, weight, low_float(scale)).mul(mine.unsqueeze(-1));
  // high and low halves of x minus 8, as the document has it: together x - 8
  const at::Tensor sum = by_groups(x.to(at::kShort).sub(8), weight, low_float(scale));
  return sum.add(call.together() ? call.assist[0][group.expert] : call.assist[expert])
      .mul(mine.unsqueeze(-1));
}

void run_swiglu(const SwigluCall& call) {
  const at::Tensor x = call.x.read();
  call.out.touch();
  call.out_scale.touch();
  for (const Group& group : read_groups(call.list, call.list_type,
                                        call.rows())) {  // rows behind the last are not written
    if (group.start == group.end) continue;
    at::Tensor y = dequantised(call, x.slice(0, group.start, group.end), group);
    if (call.dequant_dtype == 1 || call.dequant_dtype == 27)
      y = y.to(call.dequant_dtype == 1 ? kF16 : kBF16).to(kF32);
    y = swiglu_of(y);
    if (call.smooth.defined() && call.smooth.numel()) y = y.mul(call.smooth[group.expert]);
    call.mx() ? store_mx(call, y, group.start, group.end)
              : store_rows(call, y, group.start, group.end);
  }
}

void SwigluCall::check() const { check_swiglu(opened()); }
void SwigluCall::run() const { run_swiglu(opened()); }

// The first version: ends of groups only, and the weight read as NZ whatever it says it is.
struct First {
  Matrix x, weight;
  at::Tensor bias, offset, weight_scale, x_scale, list;
  Out out, out_scale, out_offset;
  FIELDS(all, x, weight, bias, offset, weight_scale, x_scale, list, out, out_scale, out_offset)

  SwigluCall call() const {
    const std::vector<at::Tensor> assist(bias.defined() ? 1 : 0, bias);
    return {x,
            {weight.as_int4()},
            {weight_scale},
            assist,
            {},
            x_scale,
            {},
            list,
            weight_scale.dim() == 3,
            0,
            0,
            0,
            {},
            out,
            out_scale};
  }
  void check() const {
    require_generation(kOnA2 | kOnA3);
    require(weight.nz, "weight", show(weight),
            "the NZ format (a weight without that mark is not emulated)");
    require(!offset.defined(), "offset", show(offset), "nothing (reserved)");
    check_swiglu(call());
  }
  void run() const { run_swiglu(call()); }
};

}  // namespace

NAMED(aclnnGroupedMatmulSwigluQuantWeightNZ, First, all, check, run)
NAMED(aclnnGroupedMatmulSwigluQuantV2, SwigluCall, all, check, run)
NAMED(aclnnGroupedMatmulSwigluQuantWeightNzV2, SwigluCall, all, check, run)

}  // namespace softnpu::grouped
