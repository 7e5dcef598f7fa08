// npu_grouped_matmul_swiglu_quant and _v2: a grouped product, swiglu of its halves, and the quantised result.
// mirror-cann ops-transformer: gmm/grouped_matmul_swiglu_quant/docs/aclnnGroupedMatmulSwigluQuantWeightNZ.md,
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
  Ins scale, assist;
  In bias, x_scale, smooth, list;
  int64_t dequant_mode, dequant_dtype, quant_mode, list_type;
  Out out, out_scale;

  int64_t rows() const { return x.size(0); }
  int64_t depth() const { return x.size(1); }
  int64_t columns() const { return weight[0].size(-1); }
  int64_t groups() const { return together() ? weight[0].size(0) : static_cast<int64_t>(weight.size()); }
  bool together() const { return weight[0].dim() == 3; }
  bool mx() const { return x_scale.scalar_type() == kE8M0; }
};

// Combinations: chips, layouts, x, weight, weight_scale, x_scale, output, assist matrix, smooth scale.
struct SwigluForm {
  unsigned where, layouts;
  Types x, weight, scale, x_scale, out;
  bool assist, smooth;
};
const std::vector<SwigluForm>& swiglu_forms() {
  // clang-format off
  static const std::vector<SwigluForm> table = {
      {kOnA2 | kOnA3, kNz, {kI8}, {kI8}, {kF32, kF16, kBF16}, {kF32}, {kI8}, false, false},
      {kOnA2 | kOnA3, kNd | kNz, {kI8}, {kI4}, {at::kUInt64, at::kLong}, {kF32}, {kI8}, true, false},
      {kOnA2 | kOnA3, kNd | kNz, {kI4}, {kI4}, {at::kUInt64, at::kLong}, {kF32}, {kI8}, false, true},
      {kOnA5, kNd, {kE4M3, kE5M2}, {kE4M3, kE5M2}, {kE8M0}, {kE8M0}, {kE4M3, kE5M2}, false, false},
      {kOnA5, kNz, {kE4M3}, {kE4M3}, {kE8M0}, {kE8M0}, {kE4M3}, false, false},
      {kOnA5, kNd, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, {kE2M1, kE4M3, kE5M2}, false, false},
      {kOnA5, kNz, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, {kE2M1, kE4M3}, false, false},
      {kOnA5, kNz, {kE4M3}, {kE2M1}, {kE8M0}, {kE8M0}, {kE4M3}, false, false},
      {kOnA5, kNd, {kE4M3, kE5M2}, {kE4M3, kE5M2}, {kF32, kBF16}, {kF32}, {kE4M3, kE5M2}, false, false},
      {kOnA5, kNd, {kI8}, {kI8}, {kF32, kBF16, kF16}, {kF32}, {kI8}, false, false},
  };
  // clang-format on
  return table;
}

const SwigluForm& swiglu_form(const SwigluCall& c) {
  auto rows = rows_here(swiglu_forms(), c.weight[0].nz);
  narrow(rows, "x", c.x.dtype, show(c.x), &SwigluForm::x);
  narrow(rows, "weight", c.weight[0].dtype, show(c.weight[0]), &SwigluForm::weight);
  narrow(rows, "weight_scale", c.scale[0].scalar_type(), show(c.scale[0]), &SwigluForm::scale);
  narrow(rows, "x_scale", c.x_scale.scalar_type(), show(c.x_scale), &SwigluForm::x_scale);
  narrow(rows, "output", c.out->scalar_type(), show(*c.out), &SwigluForm::out);
  return *rows.front();
}

void check_swiglu_modes(const SwigluCall& c) {
  const bool a5 = on_a5();
  require(c.list_type == 0 || c.list_type == 1, "group_list_type", text(c.list_type), "0 or 1");
  if (!a5) {
    const bool int8 = c.weight[0].dtype == kI8;
    require(c.dequant_mode == 0 || (c.dequant_mode == 1 && !int8), "dequant_mode", text(c.dequant_mode),
            int8 ? "0" : "0 or 1");
    const bool parts = c.scale[0].dim() == (c.together() ? 3 : 2);
    require(int8 || parts == (c.dequant_mode == 1), "dequant_mode", text(c.dequant_mode),
            "0 for scales of columns, 1 for scales of groups");
    require(c.columns() <= 10240, "weight", show(c.weight[0]), "N at most 10240");
    require(c.depth() < (int8 ? 65536 : 20000), "x", show(c.x), int8 ? "K below 65536" : "K below 20000");
    return;
  }
  const int64_t mode = c.mx() ? 2 : 0;
  require(c.dequant_mode == mode, "dequant_mode", text(c.dequant_mode), c.mx() ? "2 (MX)" : "0");
  require(c.quant_mode == mode, "quant_mode", text(c.quant_mode), c.mx() ? "2 (MX)" : "0");
  const int64_t dtype = c.dequant_dtype;
  require(dtype == 0 || (!c.mx() && (dtype == 1 || dtype == 27)), "dequant_dtype", text(dtype),
          c.mx() ? "fp32" : "fp32, fp16 or bf16");
  require(c.groups() <= 1024, "group_list", show(c.list), "at most 1024 groups");
}

void check_swiglu_shapes(const SwigluCall& c, const SwigluForm& form) {
  const int64_t k = c.depth(), n = c.columns(), m = c.rows();
  for (size_t i = 0; i < c.weight.size(); ++i) {
    const Matrix& w = c.weight[i];
    require(w.dim() == (c.weight.size() == 1 ? 3 : 2) || w.dim() == 2, "weight", show(w), "[groups, K, N]");
    require(w.size(-2) == k && w.size(-1) == n, "weight", show(w), "K of x and one N");
    require(w.dtype == c.weight[0].dtype && w.nz == c.weight[0].nz, "weight", show(w), "one dtype and format");
  }
  require(c.scale.size() == c.weight.size(), "weight_scale", "another number", "one for each weight");
  const auto each = [&](std::vector<int64_t> shape) {
    if (c.together()) shape.insert(shape.begin(), c.groups());
    return shape;
  };
  for (const at::Tensor& scale : c.scale) {
    if (c.mx()) {
      require_shape("weight_scale", scale, {each({ceil_div(k, 64), n, 2})});
      continue;
    }
    const bool parts = c.weight[0].dtype == kI4 && c.dequant_mode == 1;
    const int64_t count = parts ? scale.size(-2) : 1;
    require_shape("weight_scale", scale, {parts ? each({count, n}) : each({n})});
    require(k % count == 0, "weight_scale", show(scale), "groups that divide K");
  }
  require_shape("x_scale", c.x_scale, {c.mx() ? std::vector<int64_t>{m, ceil_div(k, 64), 2} : std::vector<int64_t>{m}});
  if (form.assist) {
    require(given(c.assist) && c.assist.size() == c.weight.size(), "weight_assist_matrix", "nothing", "[groups, N]");
    for (const at::Tensor& one : c.assist) {
      require(one.scalar_type() == kF32, "weight_assist_matrix", show(one), "fp32");
      require_shape("weight_assist_matrix", one, {each({n})});
    }
  } else {
    require(!given(c.assist), "weight_assist_matrix", "a tensor", "nothing (int8 by int4 only)");
  }
  if (c.smooth.defined() && c.smooth.numel()) {
    require(form.smooth && c.smooth.scalar_type() == kF32, "smooth_scale", show(c.smooth),
            "nothing (int4 by int4 only)");
    require_shape("smooth_scale", c.smooth, {{c.groups()}, {c.groups(), n / 2}});
  }
  if (!c.mx()) return;
  const int64_t step = c.weight[0].nz ? (c.x.dtype == kE2M1 ? 128 : 64) : (c.x.dtype == kE2M1 ? 4 : 2);
  require(n % step == 0, "weight", show(c.weight[0]), "N a multiple of 2 (FP4: 4; NZ: 64, FP4 128)");
  require(c.x.dtype != kE2M1 || (k % 2 == 0 && k > 2), "x", show(c.x), "an even K above 2");
  if (c.weight[0].dtype == kE2M1 && c.x.dtype != kE2M1) {
    require(k % 32 == 0 && n >= 128, "weight", show(c.weight[0]), "K a multiple of 32, N at least 128");
    require(c.weight[0].transposed, "weight", "a tensor that is not transposed", "a transposed one");
  }
}

void check_swiglu(const SwigluCall& c) {
  require(!c.weight.empty() && !c.scale.empty(), "weight", "nothing", "a tensor");
  check_table({{"x_scale", true, {kF32, kE8M0}, 1, 3, Source::kDocument},
               {"group_list", true, {at::kLong}, 1, 1, Source::kDocument}},
              {c.x_scale, c.list});
  require(!c.bias.defined(), "bias", show(c.bias), "nothing (reserved)");
  require(c.x.dim() == 2, "x", show(c.x), "[M, K]");
  require(c.weight[0].dim() >= 2, "weight", show(c.weight[0]), "[groups, K, N], or several of [K, N]");
  require(on_a5() || (c.rows() > 0 && c.columns() > 0), "x", show(c.x), "no empty tensor");
  const SwigluForm& form = swiglu_form(c);
  check_swiglu_modes(c);
  require(c.list.size(0) == c.groups(), "group_list", show(c.list), "one group for each weight");
  require(c.columns() % 2 == 0, "weight", show(c.weight[0]), "an even N");
  check_swiglu_shapes(c, form);
}

// FP8 or FP4 with one power of two for each 32 values. The exponent is rounded down as the format's standard has it
// (our reading: the document's brackets differ).
void store_mx(const SwigluCall& c, In y, int64_t start, int64_t end) {
  const auto dtype = c.out->scalar_type();
  const Mx mx = mx_quantise(y, dtype, {});
  c.out_scale->slice(0, start, end).view(at::kByte).copy_(mx.scale);
  const at::Tensor target = c.out->slice(0, start, end);
  (dtype == kE2M1 ? target.view(at::kByte) : target).copy_(mx.y);
}

void store_rows(const SwigluCall& c, In y, int64_t start, int64_t end) {
  const auto dtype = c.out->scalar_type();
  const double top = largest(dtype);
  const at::Tensor scale = at::amax(y.abs(), {-1}).div(top);
  c.out_scale->slice(0, start, end).copy_(scale);
  const at::Tensor divisor = scale.unsqueeze(-1);
  at::Tensor q = at::where(divisor.eq(0), at::zeros({}, kF32), y.div(divisor)).clamp(-top, top);
  c.out->slice(0, start, end).copy_(dtype == kI8 ? at::round(q) : q);
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

at::Tensor dequantised(const SwigluCall& c, In x, const Group& group) {
  const auto expert = static_cast<size_t>(group.expert);
  const at::Tensor weight = c.together() ? c.weight[0][group.expert].read() : c.weight[expert].read();
  const at::Tensor scale = c.together() ? c.scale[0][group.expert] : c.scale[expert];
  const at::Tensor mine = c.x_scale.slice(0, group.start, group.end);
  if (c.mx()) {
    const int64_t k = c.depth();
    return product(x.to(kF32).mul(stretch(mx_rows(mine), 32, 1, k)),
                   weight.to(kF32).mul(stretch(mx_columns(scale), 32, 0, k)));
  }
  if (!given(c.assist)) return by_groups(x, weight, low_float(scale)).mul(mine.unsqueeze(-1));
  // high and low halves of x minus 8, as the document has it: together x - 8
  const at::Tensor sum = by_groups(x.to(at::kShort).sub(8), weight, low_float(scale));
  return sum.add(c.together() ? c.assist[0][group.expert] : c.assist[expert]).mul(mine.unsqueeze(-1));
}

void run_swiglu(const SwigluCall& c) {
  const at::Tensor x = c.x.read();
  c.out.touch();
  c.out_scale.touch();
  for (const Group& group : read_groups(c.list, c.list_type, c.rows())) {  // rows behind the last are not written
    if (group.start == group.end) continue;
    at::Tensor y = dequantised(c, x.slice(0, group.start, group.end), group);
    if (c.dequant_dtype == 1 || c.dequant_dtype == 27) y = y.to(c.dequant_dtype == 1 ? kF16 : kBF16).to(kF32);
    y = swiglu_of(y);
    if (c.smooth.defined() && c.smooth.numel()) y = y.mul(c.smooth[group.expert]);
    c.mx() ? store_mx(c, y, group.start, group.end) : store_rows(c, y, group.start, group.end);
  }
}

SwigluCall v2(Matrix_ x, Matrices w, Ins scale, Ins assist, In bias, In x_scale, In smooth, In list, int64_t dequant,
              int64_t dtype, int64_t quant, int64_t list_type, Out out, Out out_scale) {
  std::vector<Matrix> weight;
  for (const Matrix& one : w) weight.push_back(one.as_int4());
  return {x.as_int4(), weight,  scale, assist, bias,      x_scale, smooth,
          list,        dequant, dtype, quant,  list_type, out,     out_scale};
}

constexpr auto check_v2 = [](Matrix_ x, Matrices w, Ins scale, Ins assist, In bias, In x_scale, In smooth, In list,
                             int64_t dequant, int64_t dtype, int64_t quant, int64_t list_type, Ints, Out out,
                             Out out_scale) {
  check_swiglu(v2(x, w, scale, assist, bias, x_scale, smooth, list, dequant, dtype, quant, list_type, out, out_scale));
};
constexpr auto run_v2 = [](Matrix_ x, Matrices w, Ins scale, Ins assist, In bias, In x_scale, In smooth, In list,
                           int64_t dequant, int64_t dtype, int64_t quant, int64_t list_type, Ints, Out out,
                           Out out_scale) {
  run_swiglu(v2(x, w, scale, assist, bias, x_scale, smooth, list, dequant, dtype, quant, list_type, out, out_scale));
};

// The first version: ends of groups only, and the weight read as NZ whatever it says it is.
struct First {
  std::vector<Matrix> weight;
  std::vector<at::Tensor> scale, assist;
  at::Tensor nothing;
  SwigluCall call;
  First(Matrix_ x, Matrix_ w, In bias, In weight_scale, In x_scale, In list, Out out, Out out_scale)
      : weight{w.as_int4()},
        scale{weight_scale},
        assist(bias.defined() ? std::vector<at::Tensor>{bias} : std::vector<at::Tensor>{}),
        call{x, weight, scale, assist, nothing,  x_scale, nothing, list, weight_scale.dim() == 3 ? 1 : 0,
             0, 0,      0,     out,    out_scale} {}
};

constexpr auto check_first = [](Matrix_ x, Matrix_ w, In bias, In offset, In scale, In x_scale, In list, Out out,
                                Out out_scale, Out) {
  require_generation(kOnA2 | kOnA3);
  require(w.nz, "weight", show(w), "the NZ format (a weight without that mark is not emulated)");
  require(!offset.defined(), "offset", show(offset), "nothing (reserved)");
  check_swiglu(First(x, w, bias, scale, x_scale, list, out, out_scale).call);
};

}  // namespace

CHECKED(aclnnGroupedMatmulSwigluQuantWeightNZ, check_first,
        [](Matrix_ x, Matrix_ w, In bias, In, In scale, In x_scale, In list, Out out, Out out_scale, Out) {
          run_swiglu(First(x, w, bias, scale, x_scale, list, out, out_scale).call);
        })
CHECKED(aclnnGroupedMatmulSwigluQuantV2, check_v2, run_v2)
CHECKED(aclnnGroupedMatmulSwigluQuantWeightNzV2, check_v2, run_v2)

}  // namespace softnpu::grouped
