// What the RMS norms that quantise have in common.
#pragma once

#include "fused_quant.h"

namespace softnpu {

SOFTNPU_CXX at::Tensor inverse_rms(
    In wide, int64_t axes,
    double epsilon);  // of the last `axes` dimensions, which stay as ones
// fp32; beta may be undefined
SOFTNPU_CXX at::Tensor normalised(In wide, In r, In gamma, In beta);
// Sizes of x without its last `axes` dimensions.
std::vector<int64_t> outer_sizes(In x, int64_t axes);

}  // namespace softnpu
