// What the operators that DeepSeek V4's launchers call share: CANN 9.1's family and its roundings.
#pragma once

#include "check.h"

namespace softnpu {

// Refuses an operator before this CANN.
void require_version(int major, int minor);
// Refuses an operator of the family where it does not exist: another chip, or CANN before 9.1.0.
void require_family(unsigned where = kEverywhere, int code = kNnParameter);
SOFTNPU_CXX at::Tensor hf32(In x);  // fp32 as the matrix unit reads it in HF32: cut to 10 explicit
                                    // mantissa bits (spec/v4.md 2.4)
// Refuses a cubeMathType that the pages of the products do not allow beside this dtype.
void check_cube(int64_t cube_math_type, at::ScalarType dtype, int64_t highest);
// What a product reads of x: fp32 in HF32 for 1 and 3, rounded to fp16 for 2; itself otherwise.
at::Tensor as_cube_reads(In x, int64_t cube_math_type);
at::Tensor over(In x, In scale);  // x / scale, and 0 where the scale is 0: our reading

struct Int8Rows {
  at::Tensor y, scale;  // whole numbers in fp32, and [...] in fp32
};
// Largest magnitudes or ranges over `top`. NaN for what is not finite, of which nothing plausible
// follows: our reading.
at::Tensor scale_of(In range, double top);
SOFTNPU_CXX Int8Rows quantised_rows(In x, double top = 127);  // each row by its largest magnitude

std::vector<int64_t> but_last(In x,
                              const std::vector<int64_t>& last);  // x's shape with another end
SOFTNPU_CXX void require_sizes(const char* argument, In found, const std::vector<int64_t>& sizes);

}  // namespace softnpu
