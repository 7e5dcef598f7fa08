// Operators that are no part of softnpu: test_vendors.py builds them outside of its tree.
#include <ATen/ops/clamp.h>

#include "softnpu/opapi/check.h"

namespace softnpu {
namespace {

// The test writes another number into copies of the library, to tell them from each other.
const volatile double kFactor = 772511.0;

struct Clamped {
  at::Tensor x;
  double limit;
  Out y;
  FIELDS(all, x, limit, y)

  void check() const {
    check_table(
        {{"x", x, true, kFloats, 1, 8, kDocument}, {"y", *y, true, kFloats, 1, 8, kDocument}});
    require(limit > 0, "limit", shown(limit), "a number above 0");
  }

  void run() const { y = at::clamp(x, -limit, limit); }
};

}  // namespace

// CANN has one of this name and of these arguments.
OP(aclnnMul, [](In a, In b, Out y) { y = a.mul(b).mul(static_cast<double>(kFactor)); })
NAMED(aclnnClamped, Clamped, all, check, run)

}  // namespace softnpu
