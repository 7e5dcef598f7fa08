// SwiGLU between dequantisation and quantisation to int8. Tables: argument, its tensor, required,
// dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/round.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

// How many rows a list of counts covers; more than there are is a fault.
int64_t counted_rows(In counts, int64_t rows, const char* argument) {
  expect_values(counts, 0, rows + 1, argument);
  const at::Tensor sum = at::sum(counts);
  expect_values(sum, 0, rows + 1, argument);
  return sum.item<int64_t>();
}

// mirror-cann/ops-nn quant/dequant_swiglu_quant/docs/aclnnDequantSwigluQuantV2.md. vllm-ascend's
// package has another operator of this name, whose mode 1 is this one's mode 2
// (docs/spec/ascend-operators.md 12.1). On Ascend 950 int8 results along the last dimension are
// emulated.
struct DequantSwiglu {
  at::Tensor x, weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index;
  bool activate_left;
  std::string quant_mode;
  int64_t dst_type;
  std::string round_mode;
  int64_t activate_dim, swiglu_mode;
  double clamp_limit, glu_alpha, glu_bias;
  Out y, scale;
  FIELDS(all, x, weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index,
         activate_left, quant_mode, dst_type, round_mode, activate_dim, swiglu_mode, clamp_limit,
         glu_alpha, glu_bias, y, scale)

  bool dynamic() const { return quant_mode == "dynamic"; }
  int64_t groups() const { return group_index.defined() ? group_index.size(0) : 1; }

  void check_modes() const {
    require(quant_mode.empty() || dynamic() || quant_mode == "static", "quantMode", quant_mode,
            "dynamic or static");
    const int64_t wanted = y->scalar_type() == kI8 ? 2 : y->scalar_type() == kE5M2 ? 35 : 36;
    require(dst_type == wanted, "dstType", text(dst_type), "the dtype of yOut");
    require(wanted == 2 || dynamic(), "quantMode", quant_mode,
            "dynamic with FLOAT8 (static is not emulated)");
    require(round_mode.empty() || round_mode == "rint", "roundMode", round_mode, "rint");
    require(activate_dim == -1 || (on_a5() && activate_dim == x.dim() - 1), "activateDim",
            text(activate_dim), on_a5() ? "the last dimension (others are not emulated)" : "-1");
    // Mode 2 is of A2 and A3: docs/spec/ascend-operators.md 12.1.
    require(swiglu_mode >= 0 && swiglu_mode <= (on_a5() ? 1 : 2), "swigluMode", text(swiglu_mode),
            on_a5() ? "0 or 1" : "0 (halves), 1 (even and odd) or 2 (clamped halves)");
    require(swiglu_mode != 1 || activate_left, "activateLeft", "false", "true in mode 1");
    if (swiglu_mode)
      require(clamp_limit > 0 && clamp_limit < std::numeric_limits<double>::infinity(),
              "clampLimit", std::to_string(clamp_limit), "a positive finite number");
    if (!on_a5()) return;
    const bool defaults = static_cast<float>(clamp_limit) == 7.0F &&
                          static_cast<float>(glu_alpha) == 1.702F && glu_bias == 1;
    require(defaults, "clampLimit",
            std::to_string(clamp_limit) + ", gluAlpha " + std::to_string(glu_alpha) + ", gluBias " +
                std::to_string(glu_bias),
            "the defaults 7.0, 1.702 and 1.0 on this chip");
  }

  // Without groups the kernel of A2 and A3 knows neither modes nor clamp: the page wants a list.
  void check_groups() const {
    const int64_t width = x.size(-1);
    if (on_a5()) return;
    require(x.dim() == 2, "x", show(x), "2 dimensions");
    require(width % 64 == 0 && width <= 7232, "x", show(x),
            "a last dimension that is a multiple of 64, at most 7232");
    require(group_index.defined(), "groupIndex", "nothing",
            "a tensor, on this chip (one count for all rows where there are no groups)");
  }

  void require_rows(const char* argument, In found, int64_t width, bool one_value) const {
    if (!found.defined()) return;
    const auto sizes = found.sizes();
    const bool fits = sizes == at::IntArrayRef({groups(), width}) ||
                      (groups() == 1 && sizes == at::IntArrayRef({width})) ||
                      (one_value && sizes == at::IntArrayRef({groups()}));
    require(fits, argument, show(found),
            (at::str(at::IntArrayRef({groups(), width})) + (one_value ? " or [groups]" : "") +
             (groups() == 1 ? ", or without the first dimension" : ""))
                .c_str());
  }

  void check_parameters() const {
    const int64_t width = x.size(-1);
    const bool integers = x.scalar_type() == kI32;
    for (const auto& [name, tensor] :
         {std::pair("weightScale", weight_scale), std::pair("activationScale", activation_scale),
          std::pair("bias", bias)})
      require(integers || !tensor.defined(), name, show(tensor), "nothing, as x is not INT32");
    if (integers && !weight_scale.defined())
      throw Fault(kNnNullptr, "argument 'weightScale' is null beside an INT32 x");
    require_rows("weightScale", weight_scale, width, false);
    require_rows("bias", bias, width, false);
    if (activation_scale.defined() && activation_scale.sizes() != at::IntArrayRef(but_last(x, {1})))
      require_sizes("activationScale", activation_scale, but_last(x, {}));
    require(!dynamic() || !quant_offset.defined(), "quantOffset", show(quant_offset),
            "nothing in the dynamic mode");
    if (!dynamic() && (!quant_scale.defined() || !quant_offset.defined()))
      throw Fault(kNnNullptr, "argument 'quantScale' or 'quantOffset' is null in the static mode");
    require_rows("quantScale", quant_scale, width / 2, !dynamic());
    if (!quant_offset.defined()) return;
    require(quant_offset.sizes() == quant_scale.sizes() &&
                quant_offset.scalar_type() == quant_scale.scalar_type(),
            "quantOffset", show(quant_offset), "shape and dtype of quantScale");
  }

  void check() const {
    require_family();
    const Types inputs = on_a5() ? Types{kF16, kBF16, kI32} : Types{kBF16, kI32};
    check_table({{"x", x, true, inputs, 2, 8, kDocument},
                 {"weightScale", weight_scale, false, {kF32}, 1, 2, kDocument},
                 {"activationScale", activation_scale, false, {kF32}, 1, 8, kDocument},
                 {"bias", bias, false, {kF32, kF16, kBF16, kI32}, 1, 2, kDocument},
                 {"quantScale", quant_scale, false, {kF32}, 1, 2, kDocument},
                 {"quantOffset", quant_offset, false, {kF32}, 1, 2, kDocument},
                 {"groupIndex", group_index, false, {at::kLong}, 1, 1, kDocument},
                 {"yOut", *y, true, also_on_a5({kI8}, {kE4M3, kE5M2}), 2, 8, kDocument},
                 {"scaleOut", *scale, true, {kF32}, 1, 7, kDocument}});
    require(x.numel() > 0 && x.size(-1) % 2 == 0, "x", show(x),
            "an even last dimension, and no empty tensor");
    for (const auto& [name, tensor] :
         {std::pair("x", x), std::pair("yOut", *y), std::pair("scaleOut", *scale)})
      require(tensor.is_contiguous(), name, show(tensor) + " with gaps", "a contiguous tensor");
    check_modes();
    check_groups();
    check_parameters();
    require_sizes("yOut", *y, but_last(x, {x.size(-1) / 2}));
    require_sizes("scaleOut", *scale, but_last(x, {}));
  }

  at::Tensor gated(In values) const {
    const auto halves = values.chunk(2, -1);
    const bool interleaved = swiglu_mode == 1;
    at::Tensor gate = interleaved ? values.slice(-1, 0, std::nullopt, 2) : halves[!activate_left];
    at::Tensor up = interleaved ? values.slice(-1, 1, std::nullopt, 2) : halves[activate_left];
    if (swiglu_mode == 0) return gate.mul(at::sigmoid(gate)).mul(up);
    gate = gate.clamp_max(clamp_limit);
    up = up.clamp(-clamp_limit, clamp_limit).add(glu_bias);
    return gate.mul(at::sigmoid(gate.mul(glu_alpha))).mul(up);
  }

  void run() const {
    const int64_t width = x.size(-1), all = x.numel() / width;
    const int64_t rows = group_index.defined() ? counted_rows(group_index, all, "groupIndex") : all;
    y.touch();  // rows of no group are not written
    if (rows == 0) return;
    at::Tensor group = at::zeros({rows}, at::kLong);
    if (group_index.defined())
      group =
          at::searchsorted(at::cumsum(group_index, 0), at::arange(rows, at::kLong), false, true);
    const auto row_of = [&group, this](In parameter) {
      const at::Tensor table = parameter.dim() == 1 && parameter.size(0) != groups()
                                   ? parameter.unsqueeze(0)
                                   : parameter;
      const at::Tensor picked = table.to(kF32).index_select(0, group);
      return picked.dim() == 1 ? picked.unsqueeze(-1) : picked;
    };
    at::Tensor values = x.view({all, width}).slice(0, 0, rows);
    const bool whole_bias = bias.defined() && bias.scalar_type() == kI32;
    if (whole_bias) values = values.add(row_of(bias).to(kI32));
    values = values.to(kF32);
    if (weight_scale.defined()) values = values.mul(row_of(weight_scale));
    if (activation_scale.defined())
      values = values.mul(activation_scale.reshape({all, 1}).slice(0, 0, rows));
    if (bias.defined() && !whole_bias) values = values.add(row_of(bias));
    store(gated(values), row_of, all, rows);
  }

  template <class RowOf>
  void store(In h, const RowOf& row_of, int64_t all, int64_t rows) const {
    const at::Tensor target = y->view({all, -1}).slice(0, 0, rows);
    if (!dynamic()) {  // static: scale divides, and scaleOut is not written
      target.copy_(
          at::round(h.div(row_of(quant_scale)).add(row_of(quant_offset))).clamp(-128, 127));
      return;
    }
    const at::Tensor smooth = quant_scale.defined() ? h.mul(row_of(quant_scale)) : h;
    const auto type = y->scalar_type();
    Int8Rows quantised;
    if (type == kI8) {
      quantised = quantised_rows(smooth);
    } else {
      quantised.scale = scale_of(at::amax(smooth.abs(), {-1}), largest(type));
      quantised.y = saturated(over(smooth, quantised.scale.unsqueeze(-1)), type);
    }
    target.copy_(quantised.y);
    scale.touch();
    scale->view({all}).slice(0, 0, rows).copy_(quantised.scale);
  }
};

}  // namespace

NAMED(aclnnDequantSwigluQuantV2, DequantSwiglu, all, check, run)

}  // namespace softnpu
