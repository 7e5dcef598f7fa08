// Element by element, one tensor.

#include <ATen/ops/abs.h>
#include <ATen/ops/acos.h>
#include <ATen/ops/acosh.h>
#include <ATen/ops/angle.h>
#include <ATen/ops/asin.h>
#include <ATen/ops/asinh.h>
#include <ATen/ops/atan.h>
#include <ATen/ops/atanh.h>
#include <ATen/ops/bitwise_not.h>
#include <ATen/ops/ceil.h>
#include <ATen/ops/celu.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/cosh.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/erfc.h>
#include <ATen/ops/erfinv.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/floor.h>
#include <ATen/ops/frac.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/hardshrink.h>
#include <ATen/ops/hardshrink_backward.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardsigmoid_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/isinf.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/isposinf.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log10.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/log_sigmoid_forward.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logit.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/polar.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/renorm.h>
#include <ATen/ops/round.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sgn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/signbit.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/sinc.h>
#include <ATen/ops/sinh.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/softshrink.h>
#include <ATen/ops/softshrink_backward.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/tan.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/trunc.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "op.h"

namespace softnpu {

#define UNARY(NAME, FUNCTION)                           \
  OP(aclnn##NAME, [](In x, Out o) { o = FUNCTION(x); }) \
  OP(aclnnInplace##NAME, [](Out x) { x = FUNCTION(*x); })

UNARY(Abs, at::abs)
UNARY(Acos, at::acos)
UNARY(Acosh, at::acosh)
UNARY(Asin, at::asin)
UNARY(Asinh, at::asinh)
UNARY(Atan, at::atan)
UNARY(Atanh, at::atanh)
UNARY(BitwiseNot, at::bitwise_not)
UNARY(Ceil, at::ceil)
UNARY(Cos, at::cos)
UNARY(Cosh, at::cosh)
UNARY(Erf, at::erf)
UNARY(Erfc, at::erfc)
UNARY(Erfinv, at::erfinv)
UNARY(Exp, at::exp)
UNARY(Exp2, at::exp2)
UNARY(Expm1, at::expm1)
UNARY(Floor, at::floor)
UNARY(Frac, at::frac)
UNARY(Hardsigmoid, at::hardsigmoid)
UNARY(Hardswish, at::hardswish)
UNARY(Log, at::log)
UNARY(Log10, at::log10)
UNARY(Log1p, at::log1p)
UNARY(Log2, at::log2)
UNARY(LogicalNot, at::logical_not)
UNARY(Mish, at::mish)
UNARY(Neg, at::neg)
UNARY(Reciprocal, at::reciprocal)
UNARY(Relu, at::relu)
UNARY(Round, at::round)
UNARY(Rsqrt, at::rsqrt)
UNARY(Sigmoid, at::sigmoid)
UNARY(Sign, at::sgn)
UNARY(Silu, at::silu)
UNARY(Sin, at::sin)
UNARY(Sinc, at::sinc)
UNARY(Sinh, at::sinh)
UNARY(Sqrt, at::sqrt)
UNARY(Tan, at::tan)
UNARY(Tanh, at::tanh)
UNARY(Trunc, at::trunc)

OP(aclnnIsFinite, [](In x, Out o) { o = at::isfinite(x); })
OP(aclnnIsInf, [](In x, Out o) { o = at::isinf(x); })
OP(aclnnIsNegInf, [](In x, Out o) { o = at::isneginf(x); })
OP(aclnnIsPosInf, [](In x, Out o) { o = at::isposinf(x); })
OP(aclnnIsnan, [](In x, Out o) { o = at::isnan(x); })
OP(aclnnSignbit, [](In x, Out o) { o = at::signbit(x); })
OP(aclnnSquare, [](In x, Out o) { o = at::square(x); })
OP(aclnnLogSigmoid, [](In x, Out o) { o = at::log_sigmoid(x); })
OP(aclnnGelu, [](In x, Out o) { o = at::gelu(x); })
OP(aclnnGeluV2,
   [](In x, int64_t approximate, Out o) { o = at::gelu(x, approximate ? "tanh" : "none"); })
OP(aclnnSwish, [](In x, OptionalScalar beta, Out o) {
  o = at::mul(x, at::sigmoid(beta ? at::mul(x, *beta) : x));
})

OP(aclnnRoundDecimals, [](In x, int64_t decimals, Out o) { o = at::round(x, decimals); })
OP(aclnnInplaceRoundDecimals, [](Out x, int64_t decimals) { x = at::round(*x, decimals); })
OP(aclnnNanToNum,
   [](In x, float nan, float high, float low, Out o) { o = at::nan_to_num(x, nan, high, low); })
OP(aclnnInplaceNanToNum,
   [](Out x, float nan, float high, float low) { x = at::nan_to_num(*x, nan, high, low); })
OP(aclnnElu, [](In x, Scalar alpha, Scalar scale, Scalar input_scale, Out o) {
  o = at::elu(x, alpha, scale, input_scale);
})
OP(aclnnInplaceElu, [](Out x, Scalar alpha, Scalar scale, Scalar input_scale) {
  x = at::elu(*x, alpha, scale, input_scale);
})
OP(aclnnHardtanh, [](In x, Scalar low, Scalar high, Out o) { o = at::hardtanh(x, low, high); })
OP(aclnnInplaceHardtanh, [](Out x, Scalar low, Scalar high) { x = at::hardtanh(*x, low, high); })
OP(aclnnLeakyRelu, [](In x, Scalar slope, Out o) { o = at::leaky_relu(x, slope); })
OP(aclnnInplaceLeakyRelu, [](Out x, Scalar slope) { x = at::leaky_relu(*x, slope); })
OP(aclnnSoftplus,
   [](In x, Scalar beta, Scalar threshold, Out o) { o = at::softplus(x, beta, threshold); })
// No eps: -1.
OP(aclnnLogit,
   [](In x, double eps, Out o) { o = at::logit(x, eps < 0 ? std::nullopt : std::optional(eps)); })
OP(aclnnHardshrink, [](In x, Scalar lambda, Out o) { o = at::hardshrink(x, lambda); })
OP(aclnnHardshrinkBackward, [](In gradient, In x, Scalar lambda, Out o) {
  o = at::hardshrink_backward(gradient, x, lambda);
})
OP(aclnnSoftshrink, [](In x, Scalar lambda, Out o) { o = at::softshrink(x, lambda); })
OP(aclnnSoftshrinkBackward, [](In gradient, In x, Scalar lambda, Out o) {
  o = at::softshrink_backward(gradient, x, lambda);
})
OP(aclnnHardsigmoidBackward,
   [](In gradient, In x, Out o) { o = at::hardsigmoid_backward(gradient, x); })
OP(aclnnHardswishBackward,
   [](In gradient, In x, Out o) { o = at::hardswish_backward(gradient, x); })
OP(aclnnHardswishBackwardV2,
   [](In gradient, In x, Out o) { o = at::hardswish_backward(gradient, x); })
OP(aclnnCelu, [](In x, Scalar alpha, Out o) { o = at::celu(x, alpha); })
OP(aclnnPrelu, [](In x, In weight, Out o) { o = at::prelu(x, weight.reshape({-1})); })
OP(aclnnPreluBackward, [](In gradient, In x, In weight, Out dx, Out dweight) {
  std::vector<int64_t> along(static_cast<size_t>(x.dim()), 1);
  if (weight.numel() > 1) along[1] = weight.numel();
  const at::Tensor positive = at::gt(x, 0), w = weight.reshape(along);
  dx = at::where(positive, gradient, at::mul(gradient, w));
  const at::Tensor share = at::where(positive, at::zeros_like(x), at::mul(gradient, x));
  dweight = share.sum_to_size(along).reshape(dweight->sizes());
})
OP(aclnnLogSigmoidForward, [](In x, Out o, Out buffer) {
  const auto [y, b] = at::log_sigmoid_forward(x);
  o = y;
  if (buffer->numel() == b.numel())
    buffer = b.reshape(buffer->sizes());
  else
    buffer.touch();
})
// The buffer is an aid of the CPU kernel's own; the derivative needs x alone.
OP(aclnnLogSigmoidBackward,
   [](In gradient, In x, In, Out o) { o = at::mul(gradient, at::sigmoid(at::neg(x))); })
OP(aclnnThreshold,
   [](In x, Scalar threshold, Scalar value, Out o) { o = at::threshold(x, threshold, value); })
OP(aclnnInplaceThreshold,
   [](Out x, Scalar threshold, Scalar value) { x = at::threshold(*x, threshold, value); })
OP(aclnnClamp,
   [](In x, OptionalScalar low, OptionalScalar high, Out o) { o = at::clamp(x, low, high); })
OP(aclnnClampMin, [](In x, Scalar low, Out o) { o = at::clamp_min(x, low); })
OP(aclnnClampMax, [](In x, Scalar high, Out o) { o = at::clamp_max(x, high); })
OP(aclnnInplaceClampMin, [](Out x, Scalar low) { x = at::clamp_min(*x, low); })
OP(aclnnInplaceClampMax, [](Out x, Scalar high) { x = at::clamp_max(*x, high); })
OP(aclnnClampTensor,
   [](In x, OptionalIn low, OptionalIn high, Out o) { o = at::clamp(x, low, high); })
OP(aclnnClampMinTensor, [](In x, In low, Out o) { o = at::clamp_min(x, low); })
OP(aclnnClampMaxTensor, [](In x, In high, Out o) { o = at::clamp_max(x, high); })
OP(aclnnInplaceClampMinTensor, [](Out x, In low) { x = at::clamp_min(*x, low); })
OP(aclnnInplaceClampMaxTensor, [](Out x, In high) { x = at::clamp_max(*x, high); })
OP(aclnnCast, [](In x, DType_ dtype, Out o) { o = x.to(scalar_type(dtype)); })

// Derivatives.
OP(aclnnSiluBackward, [](In g, In x, Out o) { o = at::silu_backward(g, x); })
OP(aclnnSigmoidBackward, [](In g, In y, Out o) { o = at::sigmoid_backward(g, y); })
OP(aclnnTanhBackward, [](In g, In y, Out o) { o = at::tanh_backward(g, y); })
OP(aclnnThresholdBackward,
   [](In g, In x, Scalar threshold, Out o) { o = at::threshold_backward(g, x, threshold); })
OP(aclnnGeluBackward, [](In g, In x, Out o) { o = at::gelu_backward(g, x); })
OP(aclnnGeluBackwardV2,
   [](In g, In x, Text approximate, Out o) { o = at::gelu_backward(g, x, approximate); })
OP(aclnnSoftplusBackward, [](In g, In x, Scalar beta, Scalar threshold, Out o) {
  o = at::softplus_backward(g, x, beta, threshold);
})
OP(aclnnHardtanhBackward,
   [](In g, In x, Scalar low, Scalar high, Out o) { o = at::hardtanh_backward(g, x, low, high); })
OP(aclnnLeakyReluBackward, [](In g, In x, Scalar slope, bool is_result, Out o) {
  o = at::leaky_relu_backward(g, x, slope, is_result);
})
OP(aclnnEluBackward,
   [](In g, Scalar alpha, Scalar scale, Scalar input_scale, bool is_result, In x, Out o) {
     o = at::elu_backward(g, alpha, scale, input_scale, is_result, x);
   })
OP(aclnnMishBackward, [](In g, In x, Out o) { o = at::mish_backward(g, x); })

OP(aclnnComplex, [](In real, In imaginary, Out o) { o = at::complex(real, imaginary); })
OP(aclnnPolar, [](In size, In angle, Out o) { o = at::polar(size, angle); })
OP(aclnnAngleV2, [](In x, Out o) { o = at::angle(x); })
OP(aclnnRenorm,
   [](In x, Scalar p, int64_t dim, Scalar largest, Out o) { o = at::renorm(x, p, dim, largest); })
OP(aclnnInplaceRenorm,
   [](Out x, Scalar p, int64_t dim, Scalar largest) { x = at::renorm(*x, p, dim, largest); })

}  // namespace softnpu
