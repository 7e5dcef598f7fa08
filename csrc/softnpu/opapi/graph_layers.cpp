// Products, convolutions and layers of the graph-operator path.
#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

#include "graph.h"
#include "rotary.h"

namespace softnpu {
namespace {

void product(const GraphArguments& a, const char* first, const char* second) {
  const auto operand = [&a](size_t i, const char* turned) {
    return a.flag(turned) ? wide(a.in(i)).transpose(-1, -2) : wide(a.in(i));
  };
  const at::Tensor result = at::matmul(operand(0, first), operand(1, second));
  const at::Tensor bias = a.optional(2);
  a.out(0) = bias.defined() ? result.add(wide(bias)) : result;
}

// pads: a pair for each axis; strides and dilations: with batch and channels before the axes.
void convolution(const GraphArguments& a, size_t first, bool transposed) {
  const at::Tensor x = wide(a.in(first)), bias = wide(a.optional(first + 2));
  const auto spatial = static_cast<size_t>(x.dim() - 2);
  const auto last = [&](const char* name) {
    const auto& all = a.attribute<std::vector<int64_t>>(name);
    return std::vector<int64_t>(all.end() - static_cast<std::ptrdiff_t>(spatial), all.end());
  };
  const auto& pads = a.attribute<std::vector<int64_t>>("pads");
  std::vector<int64_t> padding, none(spatial, 0);
  for (size_t i = 0; i < spatial; ++i) {
    if (pads.at(2 * i) != pads.at(2 * i + 1))
      throw Fault(kNnParameter, "a convolution with uneven padding is not emulated");
    padding.push_back(pads[2 * i]);
  }
  const int64_t groups = a.attributes.contains("groups") ? a.attribute<int64_t>("groups") : 1;
  a.out(0) =
      at::convolution(x, wide(a.in(first + 1)), bias.defined() ? std::optional(bias) : std::nullopt,
                      last("strides"), padding, last("dilations"), transposed,
                      transposed ? last("output_padding") : none, groups);
}

// The third result is the variance, or 1 / sqrt(variance + epsilon).
void layer_norm(const GraphArguments& a, bool variance) {
  const at::Tensor x = wide(a.in(0));
  const int64_t axis = a.attribute<int64_t>("begin_norm_axis");
  const auto sizes = x.sizes().slice(static_cast<size_t>(axis < 0 ? axis + x.dim() : axis));
  const double eps = a.attribute<double>("epsilon");
  const auto [y, mean, rstd] = at::native_layer_norm(x, sizes, wide(a.in(1)).reshape(sizes),
                                                     wide(a.in(2)).reshape(sizes), eps);
  a.out(0) = y, a.out(1) = mean.reshape(a.out(1)->sizes());
  a.out(2) = (variance ? rstd.pow(-2).sub(eps) : rstd).reshape(a.out(2)->sizes());
}

}  // namespace

GRAPH_OP(MatMul, [](const GraphArguments& a) { product(a, "transpose_x1", "transpose_x2"); })
GRAPH_OP(MatMulV2, [](const GraphArguments& a) { product(a, "transpose_x1", "transpose_x2"); })
GRAPH_OP(BatchMatMul, [](const GraphArguments& a) { product(a, "adj_x1", "adj_x2"); })
GRAPH_OP(Conv2D, [](const GraphArguments& a) { convolution(a, 0, false); })
GRAPH_OP(Conv3D, [](const GraphArguments& a) { convolution(a, 0, false); })
GRAPH_OP(Conv2DTranspose, [](const GraphArguments& a) { convolution(a, 1, true); })
GRAPH_OP(Conv3DTranspose, [](const GraphArguments& a) { convolution(a, 1, true); })

GRAPH_OP(AffineGrid, [](const GraphArguments& a) {
  a.out(0) = at::affine_grid_generator(wide(a.in(0)), integers(a.in(1)), a.flag("align_corners"))
                 .reshape(a.out(0)->sizes());
})
GRAPH_OP(LayerNorm, [](const GraphArguments& a) { layer_norm(a, true); })
GRAPH_OP(LayerNormV3, [](const GraphArguments& a) { layer_norm(a, false); })
GRAPH_OP(RotaryMul, [](const GraphArguments& a) {
  a.out(0) = rotated(a.in(0), a.in(1).to(at::kFloat), a.in(2).to(at::kFloat), rotary::kHalf);
})
GRAPH_OP(RotaryMulGrad, [](const GraphArguments& a) {
  const RotaryGradients g = rotary_gradients(a.in(3), a.in(1), a.in(2), a.in(0), rotary::kHalf);
  a.out(0) = g.x, a.out(1) = g.cos, a.out(2) = g.sin;
})
GRAPH_OP(SoftmaxCrossEntropyWithLogits, [](const GraphArguments& a) {
  const at::Tensor x = wide(a.in(0)), labels = wide(a.in(1));
  a.out(0) = labels.mul(at::log_softmax(x, -1)).sum(-1).neg();
  a.out(1) = at::softmax(x, -1).sub(labels);
})

// A pair for each dimension: how many zeros come before it and behind it.
GRAPH_OP(Pad, [](const GraphArguments& a) {
  const auto pairs = integers(a.in(1));
  std::vector<int64_t> from_last;
  for (size_t i = pairs.size(); i >= 2; i -= 2)
    from_last.insert(from_last.end(), {pairs[i - 2], pairs[i - 1]});
  a.out(0) = at::constant_pad_nd(a.in(0), from_last);
})
GRAPH_OP(OneHotD, [](const GraphArguments& a) {
  const int64_t axis = a.attribute<int64_t>("axis"), depth = a.attribute<int64_t>("depth");
  const at::Tensor hot = a.in(0).unsqueeze(-1).eq(at::arange(depth));
  const at::Tensor all = at::where(hot, a.in(1).reshape({}), a.in(2).reshape({}));
  a.out(0) = axis < 0 ? all : all.movedim(-1, axis);
})
// The lowest bit comes first; 1 stands for 1 and 0 for -1.
GRAPH_OP(SignBitsUnpack, [](const GraphArguments& a) {
  const at::Tensor bits = a.in(0).to(at::kInt).unsqueeze(-1).bitwise_right_shift(at::arange(8));
  a.out(0) = bits.bitwise_and(1).mul(2).sub(1).reshape(a.out(0)->sizes());
})
// BERT's Adam: moments without correction. Its formula is the common one: no page that we found has
// it; clipped gradients and mode "mbart_adam" are refused.
GRAPH_OP(ApplyAdamV2, [](const GraphArguments& a) {
  const auto scalar = [&a](size_t i) { return a.in(i).item<double>(); };
  if (scalar(8) > 0 || a.attribute<std::string>("adam_mode") != "adam")
    throw Fault(kKernelFault, "max_grad_norm above 0 and adam_mode mbart_adam are not emulated");
  const at::Tensor gradient = wide(a.in(7)), parameter = wide(a.in(0));
  const at::Tensor m = wide(a.in(1)).mul(scalar(4)).add(gradient.mul(1 - scalar(4)));
  const at::Tensor v = wide(a.in(2)).mul(scalar(5)).add(gradient.square().mul(1 - scalar(5)));
  const at::Tensor step = m.div(v.sqrt().add(scalar(6))).add(parameter.mul(scalar(10)));
  a.out(0) = parameter.sub(step.mul(scalar(3)));
  a.out(1) = m, a.out(2) = v;
})

}  // namespace softnpu
