// TensorFlow's strided slice, of aclnnStridedSlice and of the graph operator.
#pragma once

#include "op.h"

namespace softnpu {

struct SliceMasks {  // bit i speaks of entry i
  int64_t begin, end, ellipsis, new_axis, shrink_axis;
};
at::Tensor strided_slice(In x, Ints begin, Ints end, Ints strides, const SliceMasks& masks);

}  // namespace softnpu
