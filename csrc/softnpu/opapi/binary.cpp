// Element by element, two tensors or a tensor and a scalar.

#include <ATen/ops/add.h>
#include <ATen/ops/addcdiv.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/atan2.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/fmod.h>
#include <ATen/ops/gcd.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/isclose.h>
#include <ATen/ops/isin.h>
#include <ATen/ops/le.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logaddexp2.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/logical_xor.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/where.h>
#include <ATen/ops/xlogy.h>

#include "checked.h"

namespace softnpu {

#define BINARY(NAME, FUNCTION) OP(aclnn##NAME, [](In a, In b, Out o) { o = FUNCTION(a, b); })
#define BINARY_INPLACE(NAME, FUNCTION) \
  OP(aclnnInplace##NAME, [](Out a, In b) { a = FUNCTION(*a, b); })
#define SCALAR(NAME, FUNCTION) OP(aclnn##NAME, [](In a, Scalar b, Out o) { o = FUNCTION(a, b); })
#define SCALAR_INPLACE(NAME, FUNCTION) \
  OP(aclnnInplace##NAME, [](Out a, Scalar b) { a = FUNCTION(*a, b); })
#define BOTH(TENSOR, SCALAR_NAME, FUNCTION) \
  BINARY(TENSOR, FUNCTION)                  \
  BINARY_INPLACE(TENSOR, FUNCTION)          \
  SCALAR(SCALAR_NAME, FUNCTION) SCALAR_INPLACE(SCALAR_NAME, FUNCTION)

BOTH(Mul, Muls, at::mul)
BINARY(Div, at::div)
SCALAR(Divs, at::div)
BOTH(FloorDivide, FloorDivides, at::floor_divide)
BOTH(EqTensor, EqScalar, at::eq)
BOTH(NeTensor, NeScalar, at::ne)
BOTH(LtTensor, LtScalar, at::lt)
BOTH(LeTensor, LeScalar, at::le)
BOTH(GtTensor, GtScalar, at::gt)
BOTH(GeTensor, GeScalar, at::ge)
BOTH(BitwiseAndTensor, BitwiseAndScalar, at::bitwise_and)
BOTH(BitwiseOrTensor, BitwiseOrScalar, at::bitwise_or)
BOTH(BitwiseXorTensor, BitwiseXorScalar, at::bitwise_xor)
BOTH(FmodTensor, FmodScalar, at::fmod)
BOTH(RemainderTensorTensor, RemainderTensorScalar, at::remainder)
BOTH(PowTensorTensor, PowTensorScalar, at::pow)
BOTH(LeftShift, LeftShifts, at::bitwise_left_shift)
BOTH(RightShift, RightShifts, at::bitwise_right_shift)
SCALAR(LessScalar, at::lt)
BINARY(Maximum, at::maximum)
BINARY(Minimum, at::minimum)
BINARY(Gcd, at::gcd)
BINARY(Atan2, at::atan2)
BINARY_INPLACE(Atan2, at::atan2)
BINARY(LogicalAnd, at::logical_and)
BINARY_INPLACE(LogicalAnd, at::logical_and)
BINARY(LogicalOr, at::logical_or)
BINARY_INPLACE(LogicalOr, at::logical_or)
BINARY(LogicalXor, at::logical_xor)
BINARY(LogAddExp, at::logaddexp)
BINARY(LogAddExp2, at::logaddexp2)
BINARY(XLogYTensor, at::xlogy)
SCALAR(XLogYScalarOther, at::xlogy)

OP(aclnnPowScalarTensor, [](Scalar a, In b, Out o) { o = at::pow(a, b); })
OP(aclnnRemainderScalarTensor, [](Scalar a, In b, Out o) { o = at::remainder(a, b); })
OP(aclnnXLogYScalarSelf, [](Scalar a, In b, Out o) { o = at::xlogy(a, b); })

OP(aclnnAdd, [](In a, In b, Scalar alpha, Out o) { o = at::add(a, b, alpha); })
OP(aclnnAddV3, [](Scalar a, In b, Scalar alpha, Out o) { o = at::add(at::mul(b, alpha), a); })
OP(aclnnAdds, [](In a, Scalar b, Scalar alpha, Out o) { o = at::add(a, b, alpha); })
OP(aclnnInplaceAdd, [](Out a, In b, Scalar alpha) { a = at::add(*a, b, alpha); })
OP(aclnnInplaceAdds, [](Out a, Scalar b, Scalar alpha) { a = at::add(*a, b, alpha); })
OP(aclnnSub, [](In a, In b, Scalar alpha, Out o) { o = at::sub(a, b, alpha); })
OP(aclnnSubs, [](In a, Scalar b, Scalar alpha, Out o) { o = at::sub(a, b, alpha); })
OP(aclnnInplaceSub, [](Out a, In b, Scalar alpha) { a = at::sub(*a, b, alpha); })
OP(aclnnInplaceSubs, [](Out a, Scalar b, Scalar alpha) { a = at::sub(*a, b, alpha); })
OP(aclnnRsub, [](In a, In b, Scalar alpha, Out o) { o = at::rsub(a, b, alpha); })
OP(aclnnRsubs, [](In a, Scalar b, Scalar alpha, Out o) { o = at::rsub(a, b, alpha); })

namespace {

// aclnnInplaceDiv.md: the common dtype, fp32 of integers, must be one that may be cast to
// selfRef's.
template <class Other>
void check_quotient(const Out& a, const Other& b) {
  const at::ScalarType common = at::result_type(*a, b);
  const at::ScalarType quotient = c10::isIntegralType(common, true) ? at::kFloat : common;
  if (!c10::canCast(quotient, a->scalar_type()))
    throw Fault(kNnParameter, std::string("argument 'selfRef': found ") +
                                  c10::toString(a->scalar_type()) + ", expected a dtype to which " +
                                  c10::toString(quotient) + " may be cast");
}

// 0: true division, 1: towards zero, 2: towards minus infinity.
std::optional<std::string_view> rounding(int mode) {
  if (mode == 0) return std::nullopt;
  return mode == 1 ? "trunc" : "floor";
}

}  // namespace

OP(aclnnDivMod, [](In a, In b, int mode, Out o) { o = at::div(a, b, rounding(mode)); })
OP(aclnnDivMods, [](In a, Scalar b, int mode, Out o) { o = at::div(a, b, rounding(mode)); })
CHECKED_OP(aclnnInplaceDiv, check_quotient<at::Tensor>, [](Out a, In b) { a = at::div(*a, b); })
CHECKED_OP(aclnnInplaceDivs, check_quotient<at::Scalar>,
           [](Out a, Scalar b) { a = at::div(*a, b); })
OP(aclnnInplaceDivMod, [](Out a, In b, int mode) { a = at::div(*a, b, rounding(mode)); })
OP(aclnnInplaceDivMods, [](Out a, Scalar b, int mode) { a = at::div(*a, b, rounding(mode)); })

OP(aclnnAddcmul, [](In x, In a, In b, Scalar value, Out o) { o = at::addcmul(x, a, b, value); })
OP(aclnnAddcdiv, [](In x, In a, In b, Scalar value, Out o) { o = at::addcdiv(x, a, b, value); })
OP(aclnnInplaceAddcmul, [](Out x, In a, In b, Scalar value) { x = at::addcmul(*x, a, b, value); })
OP(aclnnInplaceAddcdiv, [](Out x, In a, In b, Scalar value) { x = at::addcdiv(*x, a, b, value); })
OP(aclnnLerp, [](In a, In b, In weight, Out o) { o = at::lerp(a, b, weight); })
OP(aclnnLerps, [](In a, In b, Scalar weight, Out o) { o = at::lerp(a, b, weight); })
OP(aclnnInplaceLerp, [](Out a, In b, In weight) { a = at::lerp(*a, b, weight); })
OP(aclnnInplaceLerps, [](Out a, In b, Scalar weight) { a = at::lerp(*a, b, weight); })
OP(aclnnIsClose, [](In a, In b, double rtol, double atol, bool equal_nan, Out o) {
  o = at::isclose(a, b, rtol, atol, equal_nan);
})
OP(aclnnSWhere,
   [](In condition, In a, In b, Out o) { o = at::where(condition.to(at::kBool), a, b); })
OP(aclnnEqual, [](In a, In b, Out o) { o = at::scalar_tensor(at::equal(a, b), at::kBool); })
OP(aclnnIsInScalarTensor,
   [](Scalar a, In b, bool unique, bool invert, Out o) { o = at::isin(a, b, unique, invert); })
OP(aclnnIsInTensorScalar,
   [](In a, Scalar b, bool unique, bool invert, Out o) { o = at::isin(a, b, unique, invert); })

}  // namespace softnpu
