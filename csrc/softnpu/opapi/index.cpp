// Gathering, scattering, embedding.
#include <ATen/core/List.h>
#include <ATen/ops/_embedding_bag.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_fill.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/masked_scatter.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/put.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/take.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include "op.h"

namespace softnpu {
namespace {

using Indices = c10::List<std::optional<at::Tensor>>;

// An axis that is not indexed arrives as a tensor of shape [0], exactly as an empty index does.
// When every entry is [0] one of them is a true (empty) index, because torch never indexes with
// nothing: then there is nothing to do.
bool selects_nothing(Ins indices) {
  for (const at::Tensor& index : indices) {
    if (!(index.dim() == 1 && index.numel() == 0)) return index.numel() == 0;
  }
  return true;
}

Indices indices_of(Ins indices) {
  Indices result;
  for (const at::Tensor& index : indices) {
    const bool all = index.dim() == 1 && index.numel() == 0;
    result.push_back(all ? std::optional<at::Tensor>() : std::optional(index));
  }
  return result;
}

at::Tensor scattered(In x, int64_t dim, In index, In source, int64_t reduction) {
  if (reduction == 0) return at::scatter(x, dim, index, source);
  return at::scatter(x, dim, index, source, reduction == 1 ? "add" : "multiply");
}

at::Tensor scattered(In x, int64_t dim, In index, Scalar value, int64_t reduction) {
  if (reduction == 0) return at::scatter(x, dim, index, value);
  return at::scatter(x, dim, index, value, reduction == 1 ? "add" : "multiply");
}

}  // namespace

OP(aclnnIndex, [](In x, Ins indices, Out o) {
  if (o->numel() == 0)
    o.touch();
  else
    o = at::index(x, indices_of(indices));
})
OP(aclnnIndexPutImpl, [](Out x, Ins indices, In value, bool accumulate, bool) {
  if (selects_nothing(indices) || value.numel() == 0)
    x.touch();
  else
    x = at::index_put(*x, indices_of(indices), value.to(x->scalar_type()), accumulate);
})
OP(aclnnIndexSelect,
   [](In x, int64_t dim, In index, Out o) { o = at::index_select(x, dim, index); })
OP(aclnnIndexAdd, [](In x, int64_t dim, In index, In source, Scalar alpha, Out o) {
  o = at::index_add(x, dim, index, source, alpha);
})
OP(aclnnIndexAddV2, [](In x, int64_t dim, In index, In source, Scalar alpha, int64_t, Out o) {
  o = at::index_add(x, dim, index, source, alpha);
})
OP(aclnnIndexCopy,
   [](In x, int64_t dim, In index, In source, Out o) { o = at::index_copy(x, dim, index, source); })
OP(aclnnInplaceIndexCopy,
   [](Out x, int64_t dim, In index, In source) { x = at::index_copy(*x, dim, index, source); })
OP(aclnnIndexFill, [](In x, int64_t dim, In index, Scalar value, Out o) {
  o = at::index_fill(x, dim, index, value);
})
OP(aclnnInplaceIndexFill,
   [](Out x, int64_t dim, In index, Scalar value) { x = at::index_fill(*x, dim, index, value); })
OP(aclnnIndexFillTensor, [](In x, int64_t dim, Ints index, Scalar value, Out o) {
  o = at::index_fill(x, dim, at::tensor(index, at::kLong), value);
})
OP(aclnnInplaceIndexFillTensor, [](Out x, int64_t dim, Ints index, Scalar value) {
  x = at::index_fill(*x, dim, at::tensor(index, at::kLong), value);
})
OP(aclnnGather,
   [](In x, int64_t dim, In index, Out o) { o = at::gather(x, dim, index.to(at::kLong)); })
OP(aclnnTake, [](In x, In index, Out o) { o = at::take(x, index); })
OP(aclnnInplacePut,
   [](Out x, In index, In source, bool accumulate) { x = at::put(*x, index, source, accumulate); })
OP(aclnnScatter, [](In x, int64_t dim, In index, In source, int64_t reduction, Out o) {
  o = scattered(x, dim, index, source, reduction);
})
OP(aclnnInplaceScatter, [](Out x, int64_t dim, In index, In source, int64_t reduction) {
  x = scattered(*x, dim, index, source, reduction);
})
OP(aclnnScatterValue, [](In x, int64_t dim, In index, Scalar value, int64_t reduction, Out o) {
  o = scattered(x, dim, index, value, reduction);
})
OP(aclnnInplaceScatterValue, [](Out x, int64_t dim, In index, Scalar value, int64_t reduction) {
  x = scattered(*x, dim, index, value, reduction);
})
OP(aclnnScatterAdd, [](In x, int64_t dim, In index, In source, Out o) {
  o = at::scatter_add(x, dim, index, source);
})
OP(aclnnEmbedding, [](In weight, In indices, Out o) { o = at::embedding(weight, indices); })
// torch_npu gives no room for offset2bag when the mode is a sum, and room for one bag too many with
// last_offset.
OP(aclnnEmbeddingBag, [](In weight, In indices, In offsets, bool by_frequency, int64_t mode,
                         bool sparse, OptionalIn weights, bool last_offset, int64_t padding, Out o,
                         Out bag_of, Out sizes, Out places) {
  const auto results = at::_embedding_bag(weight, indices, offsets, by_frequency, mode, sparse,
                                          weights, last_offset, padding);
  o = std::get<0>(results);
  if (bag_of->numel()) bag_of = std::get<1>(results);
  const at::Tensor& size = std::get<2>(results);
  sizes->slice(0, 0, size.size(0)).copy_(size);
  sizes.touch();
  if (places->sizes() == std::get<3>(results).sizes()) places = std::get<3>(results);
})
OP(aclnnEmbeddingDenseBackward,
   [](In gradient, In indices, int64_t rows, int64_t padding, bool by_frequency, Out o) {
     o = at::embedding_dense_backward(gradient, indices.to(at::kLong), rows, padding, by_frequency);
   })
OP(aclnnInplaceMaskedFillScalar,
   [](Out x, In mask, Scalar value) { x = at::masked_fill(*x, mask.to(at::kBool), value); })
OP(aclnnInplaceMaskedFillTensor,
   [](Out x, In mask, In value) { x = at::masked_fill(*x, mask.to(at::kBool), value); })
OP(aclnnInplaceMaskedScatter,
   [](Out x, In mask, In source) { x = at::masked_scatter(*x, mask.to(at::kBool), source); })
OP(aclnnOneHot, [](In x, int64_t classes, In on, In off, int64_t axis, Out o) {
  const at::Tensor hot = at::one_hot(x.to(at::kLong), classes).to(at::kBool);
  const at::Tensor filled = at::where(hot, on.reshape({}), off.reshape({}));
  o = axis == -1 ? filled : at::movedim(filled, -1, axis);
})

}  // namespace softnpu
