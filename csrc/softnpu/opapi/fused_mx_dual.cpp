// MX along the last axis and along the one before it, of a tensor, of its SwiGLU and of SwiGLU's
// gradient. Tables: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

// ops-nn quant/dynamic_mx_quant_with_dual_axis and quant/swiglu_mx_quant_with_dual_axis (their
// pages in docs/). The gradient has no page that we found: shapes as torch_npu allocates them.
struct DualMx {
  at::Tensor x, y_grad, group_index;
  bool activate_left;
  std::string round_mode;
  int64_t scale_alg;
  DType_ dst_type;
  double dst_type_max = 0;
  Out y1, mxscale1, y2, mxscale2;
  FIELDS(outputs, y1, mxscale1, y2, mxscale2)
  FIELDS(plain_front, x, round_mode, dst_type, scale_alg)
  FIELDS(maximum, dst_type_max)
  FIELDS(swiglu_middle, group_index, activate_left, round_mode, scale_alg, dst_type, dst_type_max)
  FIELDS(only_x, x)
  FIELDS(x_and_gradient, x, y_grad)
  auto plain() { return plain_front() + outputs(); }
  auto plain_v2() { return plain_front() + maximum() + outputs(); }
  auto forward() { return only_x() + swiglu_middle() + outputs(); }
  auto backward() { return x_and_gradient() + swiglu_middle() + outputs(); }

  void check_outputs(int64_t last) const {
    const bool fp4 = y1->scalar_type() == kE2M1;
    check_table({{"x", x, true, kHalves, 2, 7, kDocument},
                 {"groupIndex", group_index, false, {at::kLong}, 1, 1, kDocument},
                 {"y1", *y1, true, {kE2M1, kE4M3, kE5M2}, 2, 7, kDocument},
                 {"mxscale1", *mxscale1, true, {kE8M0}, 3, 8, kDocument},
                 {"y2", *y2, true, {y1->scalar_type()}, 2, 7, kDocument},
                 {"mxscale2", *mxscale2, true, {kE8M0}, 3, 8, kDocument}});
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(round_mode.empty() || round_mode == "rint" ||
                (fp4 && (round_mode == "floor" || round_mode == "round")),
            "roundMode", round_mode, fp4 ? "rint, floor or round" : "rint, as y1 is FLOAT8");
    require(scale_alg == 0 || scale_alg == (fp4 ? 2 : 1), "scaleAlg", text(scale_alg),
            fp4 ? "0 or 2, as y1 is FLOAT4_E2M1" : "0 or 1, as y1 is FLOAT8");
    const int64_t rows = x.size(-2), groups = group_index.defined() ? group_index.numel() : 0;
    auto scales = x.sizes().vec();
    scales.back() = ceil_div(last, 64), scales.push_back(2);
    require_sizes("mxscale1", *mxscale1, scales);
    scales[scales.size() - 2] = last;
    scales[scales.size() - 3] = groups ? rows / 64 + groups : ceil_div(rows, 64);
    require_sizes("mxscale2", *mxscale2, scales);
  }

  void check_plain() const {
    require_generation(kOnA5, kWrongPlatform);
    check_outputs(x.defined() && x.dim() ? x.size(-1) : 0);
  }

  void check_swiglu(int64_t last) const {
    require_generation(kOnA5, kWrongPlatform);
    check_outputs(last);
    require(x.dim() == 2 && x.size(1) % 2 == 0, "x", show(x), "[M, 2N]");
    require(y1->scalar_type() == kE4M3, "y1", show(*y1), "FLOAT8_E4M3FN");
    require(scale_alg == 1, "scaleAlg", text(scale_alg), "1");
    require(dst_type_max == 0, "maxDtypeValue", std::to_string(dst_type_max), "0");
  }
  void check_forward() const { check_swiglu(x.defined() && x.dim() ? x.size(-1) / 2 : 0); }
  void check_backward() const {
    check_swiglu(x.defined() && x.dim() ? x.size(-1) : 0);
    check_table({{"yGrad", y_grad, true, {x.scalar_type()}, 2, 2, kReading}});
    require_sizes("yGrad", y_grad, {x.size(0), x.size(1) / 2});
  }

  MxOptions options(int64_t axis) const {
    return {axis, 32, scale_alg, dst_type_max, 0, round_mode};
  }
  Mx quantised(In values, int64_t axis) const {
    return mx_quantise(values, y1->scalar_type(), options(axis));
  }

  // Blocks along the rows begin anew with each group, and so do the pairs of their scales. Rows
  // behind the last group, which the page excludes, are not written.
  void store(In values) const {
    const Mx along = quantised(values, -1);
    store_bytes(y1, along.y.view(at::kByte)), store_bytes(mxscale1, along.scale);
    if (!group_index.defined()) {
      const Mx across = quantised(values, -2);
      store_bytes(y2, across.y.view(at::kByte)), store_bytes(mxscale2, across.scale);
      return;
    }
    expect_values(group_index, 1, values.size(0) + 1, "groupIndex");
    y2.touch(), mxscale2.touch();
    const at::Tensor ends = group_index.contiguous();
    int64_t begin = 0;
    for (int64_t group = 0; group < ends.numel(); ++group) {
      const int64_t end = ends.const_data_ptr<int64_t>()[group];
      if (end > begin) {
        const Mx across = quantised(values.slice(0, begin, end), -2);
        y2->slice(0, begin, end).view(at::kByte).copy_(across.y.view(at::kByte));
        const int64_t row = begin / 64 + group;
        mxscale2->slice(0, row, row + across.scale.size(0)).view(at::kByte).copy_(across.scale);
      }
      begin = std::max(begin, end);
    }
  }

  void run_plain() const { store(x); }

  std::array<at::Tensor, 2> halves() const {  // activated, linear
    const auto parts = x.to(kF32).chunk(2, -1);
    return {parts[activate_left ? 0 : 1], parts[activate_left ? 1 : 0]};
  }
  void run_forward() const {
    const auto [a, b] = halves();
    store(a.mul(at::sigmoid(a)).mul(b));
  }
  void run_backward() const {
    const auto [a, b] = halves();
    const at::Tensor s = at::sigmoid(a), g = y_grad.to(kF32);
    const at::Tensor by_a = g.mul(b).mul(s).mul(a.mul(s.neg().add(1)).add(1));
    const at::Tensor by_b = g.mul(a).mul(s);
    store(activate_left ? at::cat({by_a, by_b}, -1) : at::cat({by_b, by_a}, -1));
  }
};

}  // namespace

NAMED(aclnnDynamicMxQuantWithDualAxis, DualMx, plain, check_plain, run_plain)
NAMED(aclnnDynamicMxQuantWithDualAxisV2, DualMx, plain_v2, check_plain, run_plain)
NAMED(aclnnSwigluMxQuantWithDualAxis, DualMx, forward, check_forward, run_forward)
NAMED(aclnnSwigluBackwardMxQuantWithDualAxis, DualMx, backward, check_backward, run_backward)

}  // namespace softnpu
