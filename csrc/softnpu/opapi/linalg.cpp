// Products with a summand, of vectors, and convolutions; plain products are in fused_matmul.cpp.
// The trailing int8_t is cubeMathType, which chooses between matrix-unit precisions that do not
// exist here.

#include <ATen/ops/_cdist_backward.h>
#include <ATen/ops/_cdist_forward.h>
#include <ATen/ops/addbmm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/addr.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/ger.h>
#include <ATen/ops/linalg_cross.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/pdist.h>
#include <ATen/ops/trace.h>

#include "op.h"

namespace softnpu {
namespace {

// The pages pair floating types: unlike ones are multiplied and summed in fp32.
template <class Sum>
at::Tensor summed(const Sum& sum, In x, In a, In b, Scalar beta, Scalar alpha) {
  const bool floats = a.is_floating_point() && b.is_floating_point();
  if (a.scalar_type() == b.scalar_type() || !floats) return sum(x, a, b, beta, alpha);
  return sum(x.to(at::kFloat), a.to(at::kFloat), b.to(at::kFloat), beta, alpha);
}
#define SUM_OF(FUNCTION) \
  [](In x, In a, In b, Scalar beta, Scalar alpha) { return at::FUNCTION(x, a, b, beta, alpha); }

}  // namespace

OP(aclnnMv, [](In a, In b, Out o, int8_t) { o = at::mv(a, b); })
OP(aclnnDot, [](In a, In b, Out o) { o = at::dot(a, b); })
OP(aclnnGer, [](In a, In b, Out o) { o = at::ger(a, b); })
OP(aclnnAddmm, [](In x, In a, In b, Scalar beta, Scalar alpha, Out o, int8_t) {
  o = summed(SUM_OF(addmm), x, a, b, beta, alpha);
})
OP(aclnnInplaceAddmm, [](Out x, In a, In b, Scalar beta, Scalar alpha, int8_t) {
  x = summed(SUM_OF(addmm), *x, a, b, beta, alpha);
})
OP(aclnnAddmv, [](In x, In a, In b, Scalar alpha, Scalar beta, Out o, int8_t) {
  o = at::addmv(x, a, b, beta, alpha);
})
OP(aclnnAddr,
   [](In x, In a, In b, Scalar beta, Scalar alpha, Out o) { o = at::addr(x, a, b, beta, alpha); })
OP(aclnnAddbmm, [](In x, In a, In b, Scalar beta, Scalar alpha, Out o, int8_t) {
  o = at::addbmm(x, a, b, beta, alpha);
})
OP(aclnnBaddbmm, [](In x, In a, In b, Scalar beta, Scalar alpha, Out o, int8_t) {
  o = summed(SUM_OF(baddbmm), x, a, b, beta, alpha);
})
OP(aclnnInplaceBaddbmm, [](Out x, In a, In b, Scalar beta, Scalar alpha, int8_t) {
  x = summed(SUM_OF(baddbmm), *x, a, b, beta, alpha);
})

OP(aclnnConvolution, [](In x, In weight, OptionalIn bias, Ints stride, Ints padding, Ints dilation,
                        bool transposed, Ints output_padding, int64_t groups, Out o, int8_t) {
  o = at::convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding,
                      groups);
})
OP(aclnnConvolutionBackward,
   [](In gradient, In x, In weight, OptionalInts bias, Ints stride, Ints padding, Ints dilation,
      bool transposed, Ints output_padding, int64_t groups, Bools mask, int8_t, OptionalOut dx,
      OptionalOut dweight, OptionalOut dbias) {
     const auto sizes = bias ? at::OptionalIntArrayRef(*bias) : at::OptionalIntArrayRef();
     const auto [gx, gw, gb] =
         at::convolution_backward(gradient, x, weight, sizes, stride, padding, dilation, transposed,
                                  output_padding, groups, {mask[0], mask[1], mask[2]});
     if (mask[0]) dx = gx;
     if (mask[1]) dweight = gw;
     if (mask[2]) dbias = gb;
   })

OP(aclnnTrace, [](In x, Out o) { o = at::trace(x); })
OP(aclnnLinalgCross, [](In a, In b, int64_t dim, Out o) { o = at::linalg_cross(a, b, dim); })
OP(aclnnTriangularSolve, [](In b, In a, bool upper, bool transposed, bool unit, Out x, Out copy) {
  const at::Tensor matrix = transposed ? a.mT() : a;
  x = at::linalg_solve_triangular(matrix, b, upper != transposed, true, unit);
  copy = a;
})
// The last output is V; torch's is its transpose.
OP(aclnnSvd, [](In x, bool full, bool vectors, Out s, OptionalOut u, OptionalOut v) {
  if (!vectors) {
    s = at::linalg_svdvals(x);
    return;
  }
  const auto [left, values, right] = at::linalg_svd(x, full);
  u = left, s = values, v = right.mH();
})
OP(aclnnLinalgQr, [](In x, int64_t mode, OptionalOut q, Out r) {
  const auto [left, right] = at::linalg_qr(x, mode == 0 ? "reduced" : mode == 1 ? "complete" : "r");
  if (mode != 2) q = left;
  r = right;
})
OP(aclnnPdist, [](In x, float p, Out o) { o = at::pdist(x, p); })
OP(aclnnCdist,
   [](In a, In b, float p, int64_t mode, Out o) { o = at::_cdist_forward(a, b, p, mode); })
// p = -1 stands for infinity.
OP(aclnnCdistBackward, [](In gradient, In a, In b, In distance, float p, Out o) {
  o = at::_cdist_backward(gradient, a, b, p == -1 ? std::numeric_limits<double>::infinity() : p,
                          distance);
})

}  // namespace softnpu
