// Rotary position embeddings: what their operators share.
#pragma once

#include "op.h"

namespace softnpu {

namespace rotary {
enum Mode : int64_t { kHalf, kInterleave, kQuarter, kInterleaveHalf };
}  // namespace rotary

// x * cos + turned(x) * sin in fp32; `rotate` is a matrix that turns instead of the mode.
at::Tensor rotated(In x, In cos, In sin, int64_t mode, In rotate = at::Tensor());

struct RotaryGradients {
  at::Tensor x, cos, sin;  // fp32; the last two undefined without x
};
RotaryGradients rotary_gradients(In gradient, In cos, In sin, In x, int64_t mode);

}  // namespace softnpu
