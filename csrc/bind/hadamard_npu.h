// The Hadamard matrix as an operand of launchers.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsv4::bind {

// Sylvester's matrix [n, n] of +-1, in the dtype and on the device of `like` [.., n]. Made on the
// host and kept: it costs one copy per process, and a capture that comes before it is refused
// instead of keeping what nothing has written yet.
at::Tensor sylvester(const at::Tensor& like);

}  // namespace dsv4::bind
