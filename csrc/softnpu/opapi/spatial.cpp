// Pooling, padding and patches of images.
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/_adaptive_avg_pool3d.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/adaptive_max_pool2d.h>
#include <ATen/ops/adaptive_max_pool2d_backward.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/avg_pool3d_backward.h>
#include <ATen/ops/channel_shuffle.h>
#include <ATen/ops/col2im.h>
#include <ATen/ops/im2col.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/max_pool3d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices_backward.h>
#include <ATen/ops/max_unpool2d.h>
#include <ATen/ops/max_unpool3d.h>
#include <ATen/ops/reflection_pad1d.h>
#include <ATen/ops/reflection_pad1d_backward.h>
#include <ATen/ops/reflection_pad2d.h>
#include <ATen/ops/reflection_pad2d_backward.h>
#include <ATen/ops/replication_pad1d.h>
#include <ATen/ops/replication_pad1d_backward.h>
#include <ATen/ops/replication_pad2d.h>
#include <ATen/ops/replication_pad2d_backward.h>

#include "op.h"

namespace softnpu {
namespace {

std::optional<int64_t> divisor(int64_t value) {
  return value ? std::optional(value) : std::nullopt;
}

}  // namespace

OP(aclnnMaxPool2dWithIndices,
   [](In x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out o, Out indices) {
     const auto [y, i] = at::max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil);
     o = y;
     indices = i;
   })
OP(aclnnMaxPool2dWithIndicesBackward, [](In gradient, In x, In indices, Ints kernel, Ints stride,
                                         Ints padding, Ints dilation, bool ceil, Out o) {
  o = at::max_pool2d_with_indices_backward(gradient, x, kernel, stride, padding, dilation, ceil,
                                           indices.to(at::kLong));
})
// The layout of the mask is the chip's own: backward finds the places again instead of reading it.
OP(aclnnMaxPool2dWithMask,
   [](In x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out o, Out mask) {
     o = std::get<0>(at::max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil));
     mask->zero_();
     mask.touch();
   })
OP(aclnnMaxPool2dWithMaskBackward, [](In gradient, In x, In, Ints kernel, Ints stride, Ints padding,
                                      Ints dilation, bool ceil, Out o) {
  const at::Tensor places =
      std::get<1>(at::max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil));
  o = at::max_pool2d_with_indices_backward(gradient, x, kernel, stride, padding, dilation, ceil,
                                           places);
})
OP(aclnnMaxPool3dWithArgmax,
   [](In x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out o, Out indices) {
     const auto [y, i] = at::max_pool3d_with_indices(x, kernel, stride, padding, dilation, ceil);
     o = y;
     indices = i;
   })
OP(aclnnMaxPool3dWithArgmaxBackward, [](In gradient, In x, In indices, Ints kernel, Ints stride,
                                        Ints padding, Ints dilation, bool ceil, Out o) {
  o = at::max_pool3d_with_indices_backward(gradient, x, kernel, stride, padding, dilation, ceil,
                                           indices.to(at::kLong));
})
OP(aclnnAvgPool2d, [](In x, Ints kernel, Ints stride, Ints padding, bool ceil, bool count_padding,
                      int64_t by, int8_t, Out o) {
  o = at::avg_pool2d(x, kernel, stride, padding, ceil, count_padding, divisor(by));
})
OP(aclnnAvgPool2dBackward, [](In gradient, In x, Ints kernel, Ints stride, Ints padding, bool ceil,
                              bool count_padding, int64_t by, int8_t, Out o) {
  o = at::avg_pool2d_backward(gradient, x, kernel, stride, padding, ceil, count_padding,
                              divisor(by));
})
OP(aclnnAvgPool3d,
   [](In x, Ints kernel, Ints stride, Ints padding, bool ceil, bool count_padding, int64_t by,
      Out o) { o = at::avg_pool3d(x, kernel, stride, padding, ceil, count_padding, divisor(by)); })
OP(aclnnAvgPool3dBackward, [](In gradient, In x, Ints kernel, Ints stride, Ints padding, bool ceil,
                              bool count_padding, int64_t by, Out o) {
  o = at::avg_pool3d_backward(gradient, x, kernel, stride, padding, ceil, count_padding,
                              divisor(by));
})
OP(aclnnAdaptiveAvgPool2d, [](In x, Ints size, Out o) { o = at::adaptive_avg_pool2d(x, size); })
OP(aclnnAdaptiveAvgPool2dBackward,
   [](In gradient, In x, Out o) { o = at::_adaptive_avg_pool2d_backward(gradient, x); })
OP(aclnnAdaptiveMaxPool2d, [](In x, Ints size, Out o, Out indices) {
  const auto [y, i] = at::adaptive_max_pool2d(x, size);
  o = y;
  indices = i;
})
OP(aclnnAdaptiveMaxPool2dBackward, [](In gradient, In x, In indices, Out o) {
  o = at::adaptive_max_pool2d_backward(gradient, x, indices.to(at::kLong));
})

OP(aclnnAdaptiveAvgPool3d, [](In x, Ints size, Out o) { o = at::_adaptive_avg_pool3d(x, size); })
OP(aclnnAdaptiveAvgPool3dBackward,
   [](In gradient, In x, Out o) { o = at::_adaptive_avg_pool3d_backward(gradient, x); })
OP(aclnnMaxUnpool2d,
   [](In x, In indices, Ints size, Out o) { o = at::max_unpool2d(x, indices.to(at::kLong), size); })
OP(aclnnMaxUnpool3d, [](In x, In indices, Ints size, Ints stride, Ints padding, Out o) {
  o = at::max_unpool3d(x, indices.to(at::kLong), size, stride, padding);
})
OP(aclnnChannelShuffle, [](In x, int64_t groups, Out o) { o = at::channel_shuffle(x, groups); })

OP(aclnnReflectionPad1d, [](In x, Ints padding, Out o) { o = at::reflection_pad1d(x, padding); })
OP(aclnnReflectionPad1dBackward, [](In gradient, In x, Ints padding, Out o) {
  o = at::reflection_pad1d_backward(gradient, x, padding);
})
OP(aclnnReflectionPad2d, [](In x, Ints padding, Out o) { o = at::reflection_pad2d(x, padding); })
OP(aclnnReflectionPad2dBackward, [](In gradient, In x, Ints padding, Out o) {
  o = at::reflection_pad2d_backward(gradient, x, padding);
})
OP(aclnnReplicationPad1d, [](In x, Ints padding, Out o) { o = at::replication_pad1d(x, padding); })
OP(aclnnReplicationPad1dBackward, [](In gradient, In x, Ints padding, Out o) {
  o = at::replication_pad1d_backward(gradient, x, padding);
})
OP(aclnnReplicationPad2d, [](In x, Ints padding, Out o) { o = at::replication_pad2d(x, padding); })
OP(aclnnReplicationPad2dBackward, [](In gradient, In x, Ints padding, Out o) {
  o = at::replication_pad2d_backward(gradient, x, padding);
})

OP(aclnnIm2col, [](In x, Ints kernel, Ints dilation, Ints padding, Ints stride, Out o) {
  o = at::im2col(x, kernel, dilation, padding, stride);
})
OP(aclnnIm2colBackward, [](In x, Ints size, Ints kernel, Ints dilation, Ints padding, Ints stride,
                           Out o) { o = at::col2im(x, size, kernel, dilation, padding, stride); })

}  // namespace softnpu
