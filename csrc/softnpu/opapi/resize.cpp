// Resizing images and sampling them at given places.
#include <ATen/ops/_upsample_bicubic2d_aa.h>
#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/_upsample_bilinear2d_aa_backward.h>
#include <ATen/ops/_upsample_nearest_exact1d.h>
#include <ATen/ops/_upsample_nearest_exact1d_backward.h>
#include <ATen/ops/_upsample_nearest_exact2d.h>
#include <ATen/ops/_upsample_nearest_exact2d_backward.h>
#include <ATen/ops/_upsample_nearest_exact3d.h>
#include <ATen/ops/_upsample_nearest_exact3d_backward.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/grid_sampler_2d_backward.h>
#include <ATen/ops/grid_sampler_3d.h>
#include <ATen/ops/grid_sampler_3d_backward.h>
#include <ATen/ops/upsample_bicubic2d.h>
#include <ATen/ops/upsample_bicubic2d_backward.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/upsample_bilinear2d_backward.h>
#include <ATen/ops/upsample_linear1d.h>
#include <ATen/ops/upsample_linear1d_backward.h>
#include <ATen/ops/upsample_nearest1d.h>
#include <ATen/ops/upsample_nearest1d_backward.h>
#include <ATen/ops/upsample_nearest2d.h>
#include <ATen/ops/upsample_nearest2d_backward.h>
#include <ATen/ops/upsample_nearest3d.h>
#include <ATen/ops/upsample_nearest3d_backward.h>
#include <ATen/ops/upsample_trilinear3d.h>
#include <ATen/ops/upsample_trilinear3d_backward.h>

#include "op.h"

namespace softnpu {
namespace {

std::optional<double> scale(double value) {
  return value > 0 ? std::optional(value) : std::nullopt;
}

constexpr auto bilinear_backward = [](In gradient, Ints size, Ints input, bool corners, double h,
                                      double w, Out o) {
  o = at::upsample_bilinear2d_backward(gradient, size, input, corners, scale(h), scale(w));
};

}  // namespace

OP(aclnnUpsampleNearest2d, [](In x, Ints size, Out o) { o = at::upsample_nearest2d(x, size); })
OP(aclnnUpsampleNearest2dV2, [](In x, Ints size, float h, float w, Out o) {
  o = at::upsample_nearest2d(x, size, scale(h), scale(w));
})
OP(aclnnUpsampleNearest2dBackward,
   [](In gradient, Ints size, Ints input, double h, double w, Out o) {
     o = at::upsample_nearest2d_backward(gradient, size, input, scale(h), scale(w));
   })
OP(aclnnUpsampleBilinear2d, [](In x, Ints size, bool corners, double h, double w, Out o) {
  o = at::upsample_bilinear2d(x, size, corners, scale(h), scale(w));
})
OP(aclnnUpsampleBilinear2dBackward, bilinear_backward)
OP(aclnnUpsampleBilinear2dBackwardV2, bilinear_backward)

OP(aclnnUpsampleNearest1d, [](In x, Ints size, Out o) { o = at::upsample_nearest1d(x, size); })
OP(aclnnUpsampleNearest1dV2,
   [](In x, Ints size, float w, Out o) { o = at::upsample_nearest1d(x, size, scale(w)); })
OP(aclnnUpsampleNearest1dBackward, [](In gradient, Ints size, Ints input, double w, Out o) {
  o = at::upsample_nearest1d_backward(gradient, size, input, scale(w));
})
OP(aclnnUpsampleNearest3d, [](In x, Ints size, double d, double h, double w, Out o) {
  o = at::upsample_nearest3d(x, size, scale(d), scale(h), scale(w));
})
OP(aclnnUpsampleNearest3dBackward,
   [](In gradient, Ints size, Ints input, double d, double h, double w, Out o) {
     o = at::upsample_nearest3d_backward(gradient, size, input, scale(d), scale(h), scale(w));
   })
OP(aclnnUpsampleNearestExact1d,
   [](In x, Ints size, double w, Out o) { o = at::_upsample_nearest_exact1d(x, size, scale(w)); })
OP(aclnnUpsampleNearestExact1dBackward, [](In gradient, Ints size, Ints input, double w, Out o) {
  o = at::_upsample_nearest_exact1d_backward(gradient, size, input, scale(w));
})
OP(aclnnUpsampleNearestExact2d, [](In x, Ints size, double h, double w, Out o) {
  o = at::_upsample_nearest_exact2d(x, size, scale(h), scale(w));
})
OP(aclnnUpsampleNearestExact2dBackward,
   [](In gradient, Ints size, Ints input, double h, double w, Out o) {
     o = at::_upsample_nearest_exact2d_backward(gradient, size, input, scale(h), scale(w));
   })
OP(aclnnUpsampleNearestExact3d, [](In x, Ints size, double d, double h, double w, Out o) {
  o = at::_upsample_nearest_exact3d(x, size, scale(d), scale(h), scale(w));
})
OP(aclnnUpsampleNearestExact3dBackward, [](In gradient, Ints size, Ints input, double d, double h,
                                           double w, Out o) {
  o = at::_upsample_nearest_exact3d_backward(gradient, size, input, scale(d), scale(h), scale(w));
})
OP(aclnnUpsampleLinear1d, [](In x, Ints size, bool corners, double w, Out o) {
  o = at::upsample_linear1d(x, size, corners, scale(w));
})
OP(aclnnUpsampleLinear1dBackward,
   [](In gradient, Ints size, Ints input, bool corners, double w, Out o) {
     o = at::upsample_linear1d_backward(gradient, size, input, corners, scale(w));
   })
OP(aclnnUpsampleTrilinear3d,
   [](In x, Ints size, bool corners, double d, double h, double w, Out o) {
     o = at::upsample_trilinear3d(x, size, corners, scale(d), scale(h), scale(w));
   })
OP(aclnnUpsampleTrilinear3dBackward,
   [](In gradient, Ints size, Ints input, bool corners, double d, double h, double w, Out o) {
     o = at::upsample_trilinear3d_backward(gradient, size, input, corners, scale(d), scale(h),
                                           scale(w));
   })
OP(aclnnUpsampleBicubic2d, [](In x, Ints size, bool corners, double h, double w, Out o) {
  o = at::upsample_bicubic2d(x, size, corners, scale(h), scale(w));
})
OP(aclnnUpsampleBicubic2dBackward,
   [](In gradient, Ints size, Ints input, bool corners, double h, double w, Out o) {
     o = at::upsample_bicubic2d_backward(gradient, size, input, corners, scale(h), scale(w));
   })
OP(aclnnUpsampleBilinear2dAA, [](In x, Ints size, bool corners, double h, double w, Out o) {
  o = at::_upsample_bilinear2d_aa(x, size, corners, scale(h), scale(w));
})
OP(aclnnUpsampleBilinear2dAABackward,
   [](In gradient, Ints size, Ints input, bool corners, double h, double w, Out o) {
     o = at::_upsample_bilinear2d_aa_backward(gradient, size, input, corners, scale(h), scale(w));
   })
OP(aclnnUpsampleBicubic2dAA, [](In x, Ints size, bool corners, double h, double w, Out o) {
  o = at::_upsample_bicubic2d_aa(x, size, corners, scale(h), scale(w));
})

OP(aclnnGridSampler2D, [](In x, In grid, int64_t mode, int64_t padding, bool corners, Out o) {
  o = at::grid_sampler_2d(x, grid, mode, padding, corners);
})
OP(aclnnGridSampler2DBackward, [](In gradient, In x, In grid, int64_t mode, int64_t padding,
                                  bool corners, Bools mask, OptionalOut dx, OptionalOut dgrid) {
  const auto [gx, gg] =
      at::grid_sampler_2d_backward(gradient, x, grid, mode, padding, corners, {mask[0], mask[1]});
  if (mask[0]) dx = gx;
  if (mask[1]) dgrid = gg;
})

OP(aclnnGridSampler3D, [](In x, In grid, int64_t mode, int64_t padding, bool corners, Out o) {
  o = at::grid_sampler_3d(x, grid, mode, padding, corners);
})
OP(aclnnGridSampler3DBackward, [](In gradient, In x, In grid, int64_t mode, int64_t padding,
                                  bool corners, Bools mask, OptionalOut dx, OptionalOut dgrid) {
  const auto [gx, gg] =
      at::grid_sampler_3d_backward(gradient, x, grid, mode, padding, corners, {mask[0], mask[1]});
  if (mask[0]) dx = gx;
  if (mask[1]) dgrid = gg;
})

}  // namespace softnpu
