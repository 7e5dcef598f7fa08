// An operator that is no part of softnpu: test_vendors.py builds it outside of its tree, beside
// those of docs/operators.md.
#include "softnpu/opapi/op.h"

namespace softnpu {
namespace {

// The test writes another number into copies of the library, to tell them from each other.
const volatile double kFactor = 772511.0;

}  // namespace

// CANN has one of this name and of these arguments.
OP(aclnnMul, [](In a, In b, Out y) { y = a.mul(b).mul(static_cast<double>(kFactor)); })

}  // namespace softnpu
