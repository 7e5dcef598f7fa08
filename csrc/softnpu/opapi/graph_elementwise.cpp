// Elementwise operators, reductions and views of the graph-operator path.
#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/broadcast_to.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/celu.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/le.h>
#include <ATen/ops/log.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/max.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/min.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/round.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "graph.h"
#include "slice.h"

namespace softnpu {
namespace {

// x * sigmoid(1.702 x) and its derivative
at::Tensor fast_gelu(In x) { return x.mul(at::sigmoid(x.mul(1.702))); }
at::Tensor fast_gelu_slope(In x) {
  const at::Tensor s = at::sigmoid(x.mul(1.702));
  return s.add(x.mul(1.702).mul(s).mul(s.neg().add(1)));
}

}  // namespace

#define UNARY(NAME, FUNCTION) \
  GRAPH_OP(NAME, [](const GraphArguments& a) { a.out(0) = FUNCTION(a.in(0)); })
#define BINARY(NAME, FUNCTION) \
  GRAPH_OP(NAME, [](const GraphArguments& a) { a.out(0) = FUNCTION(a.in(0), a.in(1)); })

UNARY(Abs, at::abs)
UNARY(Exp, at::exp)
UNARY(Log, at::log)
UNARY(Mish, at::mish)
UNARY(Neg, at::neg)
UNARY(Relu, at::relu)
UNARY(Sigmoid, at::sigmoid)
UNARY(Sqrt, at::sqrt)
UNARY(Tanh, at::tanh)
UNARY(ZerosLike, at::zeros_like)
BINARY(Add, at::add)
BINARY(Equal, at::eq)
BINARY(Greater, at::gt)
BINARY(GreaterEqual, at::ge)
BINARY(Less, at::lt)
BINARY(LessEqual, at::le)
BINARY(Maximum, at::maximum)
BINARY(Minimum, at::minimum)
BINARY(Mul, at::mul)
BINARY(NotEqual, at::ne)
BINARY(Pow, at::pow)
BINARY(RealDiv, at::div)
BINARY(Sub, at::sub)

GRAPH_OP(AxpyV2, [](const GraphArguments& a) { a.out(0) = a.in(0).add(a.in(1).mul(a.in(2))); })
GRAPH_OP(CeluV2, [](const GraphArguments& a) {
  a.out(0) = at::celu(a.in(0), a.attribute<double>("alpha"));
})
GRAPH_OP(FastGelu, [](const GraphArguments& a) { a.out(0) = fast_gelu(wide(a.in(0))); })
GRAPH_OP(FastGeluGrad, [](const GraphArguments& a) {
  a.out(0) = wide(a.in(0)).mul(fast_gelu_slope(wide(a.in(1))));
})
GRAPH_OP(Round, [](const GraphArguments& a) {
  const bool given = a.attributes.contains("decimals");
  a.out(0) = given ? at::round(a.in(0), a.attribute<int64_t>("decimals")) : at::round(a.in(0));
})
GRAPH_OP(Select,
         [](const GraphArguments& a) { a.out(0) = at::where(a.in(0).ne(0), a.in(1), a.in(2)); })
GRAPH_OP(SoftplusV2, [](const GraphArguments& a) {
  a.out(0) = at::softplus(a.in(0), a.attribute<double>("beta"), a.attribute<double>("threshold"));
})
GRAPH_OP(SoftmaxV2, [](const GraphArguments& a) {
  a.out(0) = at::softmax(wide(a.in(0)), a.attribute<std::vector<int64_t>>("axes").at(0));
})
GRAPH_OP(Swish, [](const GraphArguments& a) {
  const at::Tensor x = wide(a.in(0));
  a.out(0) = x.mul(at::sigmoid(x.mul(a.attribute<double>("scale"))));
})

GRAPH_OP(ArgMaxWithValue, [](const GraphArguments& a) {
  const auto [value, index] =
      at::max(a.in(0), a.attribute<int64_t>("dimension"), a.flag("keep_dims"));
  a.out(0) = index, a.out(1) = value;
})
GRAPH_OP(ArgMinWithValue, [](const GraphArguments& a) {
  const auto [value, index] =
      at::min(a.in(0), a.attribute<int64_t>("dimension"), a.flag("keep_dims"));
  a.out(0) = index, a.out(1) = value;
})
GRAPH_OP(ReduceMax, [](const GraphArguments& a) {
  a.out(0) = at::amax(a.in(0), integers(a.in(1)), a.flag("keep_dims"));
})
GRAPH_OP(ReduceMin, [](const GraphArguments& a) {
  a.out(0) = at::amin(a.in(0), integers(a.in(1)), a.flag("keep_dims"));
})
GRAPH_OP(ReduceSum, [](const GraphArguments& a) {
  a.out(0) = at::sum(wide(a.in(0)), integers(a.in(1)), a.flag("keep_dims"));
})

// A view's storage comes whole: its sizes, strides and first element are inputs of their own.
GRAPH_OP(AsStrided, [](const GraphArguments& a) {
  a.out(0) = a.in(0).reshape({-1}).as_strided(integers(a.in(1)), integers(a.in(2)),
                                              integers(a.in(3)).at(0));
})
GRAPH_OP(ViewCopy, [](const GraphArguments& a) {
  const auto view = [&a](In flat, size_t i) {
    return flat.as_strided(integers(a.in(i)), integers(a.in(i + 1)), integers(a.in(i + 2)).at(0));
  };
  a.out(0).touch();
  view(a.out(0)->view({-1}), 1).copy_(view(a.in(4).reshape({-1}), 5));
})
GRAPH_OP(BroadcastTo,
         [](const GraphArguments& a) { a.out(0) = at::broadcast_to(a.in(0), integers(a.in(1))); })
GRAPH_OP(ConcatD, [](const GraphArguments& a) {
  a.out(0) = at::cat(a.inputs, a.attribute<int64_t>("concat_dim"));
})
GRAPH_OP(ConfusionTransposeD, [](const GraphArguments& a) {
  const auto& perm = a.attribute<std::vector<int64_t>>("perm");
  const auto& shape = a.attribute<std::vector<int64_t>>("shape");
  a.out(0) = a.flag("transpose_first") ? a.in(0).permute(perm).reshape(shape)
                                       : a.in(0).reshape(shape).permute(perm);
})
GRAPH_OP(Fill, [](const GraphArguments& a) {
  a.out(0) = at::broadcast_to(a.in(1).reshape({}), a.out(0)->sizes());
})
GRAPH_OP(GatherV2D, [](const GraphArguments& a) {
  a.out(0) = at::index_select(a.in(0), a.attribute<int64_t>("axis"), a.in(1).reshape({-1}))
                 .reshape(a.out(0)->sizes());
})
// The factor of each slice along `dim`, the first values of the output; torch_npu multiplies.
GRAPH_OP(Renorm, [](const GraphArguments& a) {
  const at::Tensor x = a.in(0);
  const int64_t dim = a.attribute<int64_t>("dim");
  const at::Tensor rows = x.transpose(0, dim < 0 ? dim + x.dim() : dim).flatten(1).to(at::kFloat);
  const at::Tensor norm = at::norm(rows, a.attribute<double>("p"), {1});
  const double limit = a.attribute<double>("maxnorm");
  a.out(0).touch();
  a.out(0)
      ->view({-1})
      .slice(0, 0, norm.numel())
      .copy_(at::where(norm.gt(limit), at::reciprocal(norm.add(1e-7)).mul(limit), 1.0));
})
GRAPH_OP(Slice, [](const GraphArguments& a) {
  const auto first = integers(a.in(1)), size = integers(a.in(2));
  at::Tensor part = a.in(0);
  for (size_t axis = 0; axis < first.size(); ++axis) {
    const int64_t at = static_cast<int64_t>(axis), rest = part.size(at) - first[axis];
    part = part.narrow(at, first[axis], size[axis] == -1 ? rest : size[axis]);
  }
  a.out(0) = part;
})
GRAPH_OP(StridedSlice, [](const GraphArguments& a) {
  a.out(0) =
      strided_slice(a.in(0), integers(a.in(1)), integers(a.in(2)), integers(a.in(3)),
                    {a.attribute<int64_t>("begin_mask"), a.attribute<int64_t>("end_mask"),
                     a.attribute<int64_t>("ellipsis_mask"), a.attribute<int64_t>("new_axis_mask"),
                     a.attribute<int64_t>("shrink_axis_mask")});
})
GRAPH_OP(Transpose, [](const GraphArguments& a) { a.out(0) = a.in(0).permute(integers(a.in(1))); })

}  // namespace softnpu
