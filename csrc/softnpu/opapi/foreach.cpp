// The same operator on every tensor of a list, as optimisers use it.

#include <ATen/ops/_amp_update_scale.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcdiv.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/div.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/log.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>

#include "op.h"

namespace softnpu {
namespace {

// `step(i)` gives the i-th result; all are computed before any is stored, since outputs may be
// inputs.
template <class Step>
void each(Outs outs, Step step) {
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < outs.size(); ++i) results.push_back(step(i));
  for (size_t i = 0; i < outs.size(); ++i) outs[i] = results[i];
}

}  // namespace

#define EACH(...) each(o, [&](size_t i) { return __VA_ARGS__; })

// Four forms of the second operand: a scalar in a device tensor, a host scalar, one scalar for each
// tensor, a list of tensors.
#define ARITHMETIC(NAME, FUNCTION)                                                            \
  OP(aclnnForeach##NAME##Scalar, [](Ins a, In b, Outs o) { EACH(FUNCTION(a[i], b.item())); }) \
  OP(aclnnForeach##NAME##ScalarV2, [](Ins a, Scalar b, Outs o) { EACH(FUNCTION(a[i], b)); })  \
  OP(aclnnForeach##NAME##ScalarList, [](Ins a, Scalars b, Outs o) { EACH(FUNCTION(a[i], b[i])); })
#define LISTS(NAME, FUNCTION) \
  OP(aclnnForeach##NAME##List, [](Ins a, Ins b, Outs o) { EACH(FUNCTION(a[i], b[i])); })

ARITHMETIC(Add, at::add)
ARITHMETIC(Sub, at::sub)
ARITHMETIC(Mul, at::mul)
ARITHMETIC(Div, at::div)
ARITHMETIC(Maximum, at::clamp_min)
ARITHMETIC(Minimum, at::clamp_max)
LISTS(Mul, at::mul)
LISTS(Div, at::div)
LISTS(Maximum, at::maximum)
LISTS(Minimum, at::minimum)
OP(aclnnForeachAddList,
   [](Ins a, Ins b, In alpha, Outs o) { EACH(at::add(a[i], b[i], alpha.item())); })
OP(aclnnForeachAddListV2,
   [](Ins a, Ins b, Scalar alpha, Outs o) { EACH(at::add(a[i], b[i], alpha)); })
OP(aclnnForeachSubList,
   [](Ins a, Ins b, In alpha, Outs o) { EACH(at::sub(a[i], b[i], alpha.item())); })
OP(aclnnForeachSubListV2,
   [](Ins a, Ins b, Scalar alpha, Outs o) { EACH(at::sub(a[i], b[i], alpha)); })
OP(aclnnForeachLerpScalar,
   [](Ins a, Ins b, Scalar weight, Outs o) { EACH(at::lerp(a[i], b[i], weight)); })
OP(aclnnForeachLerpList,
   [](Ins a, Ins b, Ins weight, Outs o) { EACH(at::lerp(a[i], b[i], weight[i])); })
OP(aclnnForeachAddcmulScalar,
   [](Ins x, Ins a, Ins b, In value, Outs o) { EACH(at::addcmul(x[i], a[i], b[i], value.item())); })
OP(aclnnForeachAddcmulScalarV2,
   [](Ins x, Ins a, Ins b, Scalar value, Outs o) { EACH(at::addcmul(x[i], a[i], b[i], value)); })
OP(aclnnForeachAddcmulScalarList, [](Ins x, Ins a, Ins b, Scalars value, Outs o) {
  EACH(at::addcmul(x[i], a[i], b[i], value[i]));
})
OP(aclnnForeachAddcdivScalar,
   [](Ins x, Ins a, Ins b, In value, Outs o) { EACH(at::addcdiv(x[i], a[i], b[i], value.item())); })
OP(aclnnForeachAddcdivScalarV2,
   [](Ins x, Ins a, Ins b, Scalar value, Outs o) { EACH(at::addcdiv(x[i], a[i], b[i], value)); })
OP(aclnnForeachAddcdivScalarList, [](Ins x, Ins a, Ins b, In value, Outs o) {
  EACH(at::addcdiv(x[i], a[i], b[i], value.reshape({-1})[static_cast<int64_t>(i)].item()));
})
OP(aclnnForeachNonFiniteCheckAndUnscale, [](Outs gradients, Out found, In scale) {
  for (const Out& gradient : gradients) {
    if (!at::isfinite(*gradient).all().item().toBool()) found = at::ones_like(*found);
    gradient = at::mul(*gradient, scale);
  }
})
OP(aclnnAmpUpdateScale, [](In scale, In tracker, In found, double growth, double backoff,
                           int64_t interval, Out new_scale, Out new_tracker) {
  at::Tensor updated = scale.clone(), steps = tracker.clone();
  at::_amp_update_scale_(updated, steps, found, growth, backoff, interval);
  new_scale = updated, new_tracker = steps;
})
OP(aclnnForeachNorm, [](Ins a, Scalar p, Outs o) { EACH(at::linalg_vector_norm(a[i], p)); })
OP(aclnnForeachPowScalarV2, [](Ins a, Scalar b, Outs o) { EACH(at::pow(a[i], b)); })
OP(aclnnForeachCopy, [](Ins a, Outs o) { EACH(a[i]); })
OP(aclnnForeachZeroInplace, [](Outs o) { EACH(at::zeros_like(*o[i])); })

#define EACH_UNARY(NAME, FUNCTION) \
  OP(aclnnForeach##NAME, [](Ins a, Outs o) { EACH(FUNCTION(a[i])); })
EACH_UNARY(Abs, at::abs)
EACH_UNARY(Exp, at::exp)
EACH_UNARY(Log, at::log)
EACH_UNARY(Neg, at::neg)
EACH_UNARY(Reciprocal, at::reciprocal)
EACH_UNARY(Sign, at::sign)
EACH_UNARY(Sqrt, at::sqrt)
EACH_UNARY(Sigmoid, at::sigmoid)
EACH_UNARY(Tanh, at::tanh)

}  // namespace softnpu
