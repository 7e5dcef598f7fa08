// Arguments of fp32, in whose place contracts take fp64 so that gradients can be checked.
#pragma once

#include "candidate.h"

namespace dsv4::bind {

// Why a kernel does not read these values; strides are any.
WhyNot not_single(const char* name, const at::Tensor& tensor);

}  // namespace dsv4::bind
