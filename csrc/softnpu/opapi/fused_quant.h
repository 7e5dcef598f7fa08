// Number formats of the quantising operators: INT4, FLOAT4_E2M1, FLOAT8 and blocks with a shared
// exponent (MX).
#pragma once

#include "check.h"

namespace softnpu {

Types also_on_a5(Types everywhere,
                 const Types& a5);  // a row of a table whose list is longer on Ascend 950

double largest(
    at::ScalarType type);  // the largest finite value; of kInt the INT4 values packed into it
at::Tensor saturated(In values, at::ScalarType type);
void store_bytes(Out o, In bytes);
// Rounds (half to even) and saturates to y's type, int8, INT4 or FLOAT8; NaN is 0 where it has no
// NaN.
void store_quantised(In quotient, Out y);

at::Tensor pack(In nibbles);   // [..., 2n] -> [..., n] bytes, the even one in the low half
at::Tensor unpack(In bytes);   // the inverse, 0 to 15
at::Tensor int4_values(In x);  // of kI4, or of kInt with eight values in each
at::Tensor fp4_values(In x);   // of kE2M1
at::Tensor fp4_bytes(In values, const std::string& round_mode);

struct MxOptions {
  int64_t axis = -1, block = 32, algorithm = 0;
  double dst_max = 0, low_bound = 0;
  std::string round_mode = "rint";
};
struct Mx {
  at::Tensor y;      // values of the type, bytes for kE2M1
  at::Tensor scale;  // bytes, [..., pairs along the axis, ..., 2]
};
Mx mx_quantise(In x, at::ScalarType type, const MxOptions& options);
// Of blocks of any form by their largest magnitudes; NaN where a magnitude is not finite.
at::Tensor shared_exponents(In largest_of_block, at::ScalarType type, const MxOptions& options);
at::Tensor exponent_bytes(In exponents);  // E8M0
// Values that were divided by their scales, as the type has them; bytes for kE2M1.
at::Tensor mx_values(In scaled, at::ScalarType type, const std::string& round_mode);

}  // namespace softnpu
