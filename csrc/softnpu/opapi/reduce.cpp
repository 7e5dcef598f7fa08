// Reductions, scans, order.

#include <ATen/ops/_unique.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/all.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/any.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/argmin.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/cummin.h>
#include <ATen/ops/cumprod.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/kthvalue.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/max.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/median.h>
#include <ATen/ops/min.h>
#include <ATen/ops/nanmedian.h>
#include <ATen/ops/nansum.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/prod.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/std.h>
#include <ATen/ops/std_mean.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/unique_dim.h>
#include <ATen/ops/var.h>
#include <ATen/ops/var_mean.h>

#include "op.h"

namespace softnpu {

OP(aclnnReduceSum, [](In x, Ints dims, bool keep, DType_ dtype, Out o) {
  o = at::sum(x, dims, keep, scalar_type(dtype));
})
OP(aclnnReduceNansum, [](In x, Ints dims, bool keep, DType_ dtype, Out o) {
  o = at::nansum(x, dims, keep, scalar_type(dtype));
})
OP(aclnnMean, [](In x, Ints dims, bool keep, DType_ dtype, Out o) {
  o = at::mean(x, dims, keep, scalar_type(dtype));
})
OP(aclnnMeanV2, [](In x, Ints dims, bool keep, bool, Out o) { o = at::mean(x, dims, keep); })
OP(aclnnAmax, [](In x, Ints dims, bool keep, Out o) { o = at::amax(x, dims, keep); })
OP(aclnnAmin, [](In x, Ints dims, bool keep, Out o) { o = at::amin(x, dims, keep); })
OP(aclnnAminmax, [](In x, Ints dims, bool keep, Out low, Out high) {
  low = at::amin(x, dims, keep);
  high = at::amax(x, dims, keep);
})
OP(aclnnAll, [](In x, Ints dims, bool keep, Out o) { o = at::all(x, dims, keep); })
OP(aclnnAny, [](In x, Ints dims, bool keep, Out o) { o = at::any(x, dims, keep); })
OP(aclnnMax, [](In x, Out o) { o = at::max(x); })
OP(aclnnMin, [](In x, Out o) { o = at::min(x); })
OP(aclnnMedian, [](In x, Out o) { o = at::median(x); })
OP(aclnnProd, [](In x, DType_ dtype, Out o) { o = at::prod(x, scalar_type(dtype)); })
OP(aclnnProdDim, [](In x, int64_t dim, bool keep, DType_ dtype, Out o) {
  o = at::prod(x, dim, keep, scalar_type(dtype));
})
OP(aclnnArgMax, [](In x, int64_t dim, bool keep, Out o) { o = at::argmax(x, dim, keep); })
OP(aclnnArgMin, [](In x, int64_t dim, bool keep, Out o) { o = at::argmin(x, dim, keep); })
OP(aclnnLogSumExp, [](In x, Ints dims, bool keep, Out o) { o = at::logsumexp(x, dims, keep); })
OP(aclnnNorm, [](In x, Scalar p, Ints dims, bool keep, Out o) { o = at::norm(x, p, dims, keep); })
OP(aclnnLinalgVectorNorm, [](In x, Scalar p, OptionalInts dims, bool keep, DType_ dtype, Out o) {
  const bool all = !dims || dims->empty();
  o = at::linalg_vector_norm(x, p, all ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(*dims),
                             keep, scalar_type(dtype));
})
OP(aclnnStd, [](In x, Ints dims, int64_t correction, bool keep, Out o) {
  o = at::std(x, dims, at::Scalar(correction), keep);
})
OP(aclnnVar,
   [](In x, Ints dims, bool unbiased, bool keep, Out o) { o = at::var(x, dims, unbiased, keep); })
OP(aclnnVarCorrection, [](In x, Ints dims, int64_t correction, bool keep, Out o) {
  o = at::var(x, dims, at::Scalar(correction), keep);
})
OP(aclnnVarMean, [](In x, Ints dims, int64_t correction, bool keep, Out variance, Out mean) {
  const auto [v, m] = at::var_mean(x, dims, at::Scalar(correction), keep);
  variance = v;
  mean = m;
})
OP(aclnnStdMeanCorrection,
   [](In x, Ints dims, int64_t correction, bool keep, Out deviation, Out mean) {
     const auto [s, m] = at::std_mean(x, dims, at::Scalar(correction), keep);
     deviation = s;
     mean = m;
   })

#define WITH_INDEX(NAME, FUNCTION)                                            \
  OP(aclnn##NAME, [](In x, int64_t dim, bool keep, Out values, Out indices) { \
    const auto [v, i] = FUNCTION(x, dim, keep);                               \
    values = v;                                                               \
    indices = i;                                                              \
  })
WITH_INDEX(MaxDim, at::max)
WITH_INDEX(MinDim, at::min)
WITH_INDEX(MedianDim, at::median)

OP(aclnnKthvalue, [](In x, int64_t k, int64_t dim, bool keep, Out values, Out indices) {
  const auto [v, i] = at::kthvalue(x, k, dim, keep);
  values = v;
  indices = i;
})
OP(aclnnTopk, [](In x, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) {
  const auto [v, i] = at::topk(x, k, dim, largest, sorted);
  values = v;
  indices = i;
})
OP(aclnnSort, [](In x, bool stable, int64_t dim, bool descending, Out values, Out indices) {
  const auto [v, i] = at::sort(x, std::optional<bool>(stable), dim, descending);
  values = v;
  indices = i;
})
OP(aclnnArgsort, [](In x, int64_t dim, bool descending, Out indices) {
  indices = at::argsort(x, dim, descending);
})
OP(aclnnCumsum,
   [](In x, int64_t dim, DType_ dtype, Out o) { o = at::cumsum(x, dim, scalar_type(dtype)); })
OP(aclnnCumprod, [](In x, Scalar dim, DType_ dtype, Out o) {
  o = at::cumprod(x, dim.toLong(), scalar_type(dtype));
})
OP(aclnnInplaceCumprod, [](Out x, Scalar dim) { x = at::cumprod(*x, dim.toLong()); })
OP(aclnnCummax, [](In x, int64_t dim, Out values, Out indices) {
  const auto [v, i] = at::cummax(x, dim);
  values = v;
  indices = i;
})
OP(aclnnCummin, [](In x, int64_t dim, Out values, Out indices) {
  const auto [v, i] = at::cummin(x, dim);
  values = v;
  indices = i;
})
OP(aclnnBincount,
   [](In x, OptionalIn weights, int64_t minimum, Out o) { o = at::bincount(x, weights, minimum); })
OP(aclnnHistc, [](In x, int64_t bins, Scalar low, Scalar high, Out o) {
  o = at::histc(x.to(at::kDouble), bins, low, high);
})
OP(aclnnSearchSorted, [](In sorted, In x, bool int32, bool right, OptionalIn sorter, Out o) {
  o = at::searchsorted(sorted, x, int32, right, std::nullopt, sorter);
})
OP(aclnnSearchSorteds, [](In sorted, Scalar x, bool int32, bool right, OptionalIn sorter, Out o) {
  o = at::searchsorted(sorted, x, int32, right, std::nullopt, sorter);
})

// The number of results depends on the data.
OP(aclnnUnique2, [](In x, bool sorted, bool inverse, bool counts, Growing values, Growing inverses,
                    Growing count) {
  const auto [v, i, c] = at::_unique2(x, sorted, inverse, counts);
  values = v;
  if (inverse) inverses = i;
  if (counts) count = c;
})
OP(aclnnUniqueConsecutive, [](In x, bool inverse, bool counts, int64_t dim, Growing values,
                              Growing inverses, Growing count) {
  const auto [v, i, c] =
      at::unique_consecutive(x, inverse, counts, dim == 1000 ? std::nullopt : std::optional(dim));
  values = v;
  if (inverse) inverses = i;
  if (counts) count = c;
})
OP(aclnnNonzero, [](In x, Growing o) { o = at::nonzero(x); })
OP(aclnnNonzeroV2, [](In x, Growing o) { o = at::nonzero(x).t().contiguous(); })
OP(aclnnMaskedSelect,
   [](In x, In mask, Growing o) { o = at::masked_select(x, mask.to(at::kBool)); })

OP(aclnnUnique, [](In x, bool sorted, bool inverse, Growing values, Out inverses) {
  const auto [v, i] = at::_unique(x, sorted, inverse);
  values = v;
  if (inverse) inverses = i;
})
OP(aclnnUniqueDim,
   [](In x, bool sorted, bool inverse, int64_t dim, Growing values, Out inverses, Growing count) {
     const auto [v, i, c] = at::unique_dim(x, dim, sorted, true, true);
     values = v, count = c;
     if (inverse) inverses = i;
   })
OP(aclnnNanMedian, [](In x, Out o) { o = at::nanmedian(x); })
OP(aclnnNanMedianDim, [](In x, int64_t dim, bool keep, Out values, Out indices) {
  const auto [v, i] = at::nanmedian(x, dim, keep);
  values = v, indices = i;
})

}  // namespace softnpu
