// Sparse tensors of coordinates. Document: hicann/ops-nn index/coalesce_sparse.
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

// Coordinates that occur more than once become one, whose value is their sum. `place` says which
// of the results each of them goes to, `unique` how many there are.
struct CoalesceSparse {
  at::Tensor unique, place, indices, values;
  Out new_indices, new_values;
  FIELDS(all, unique, place, indices, values, new_indices, new_values)

  void check() const {
    const Types whole = {kI32, at::kLong};
    check_table({{"uniqueLen", unique, true, whole, 1, 1, kReading},
                 {"uniqueIndices", place, true, whole, 1, 1, kReading},
                 {"indices", indices, true, whole, 2, 2, kReading},
                 {"values", values, true, {kF32, kF16, kI32}, 1, 8, kReading},
                 {"newIndices", *new_indices, true, whole, 2, 2, kReading},
                 {"newValues", *new_values, true, {values.scalar_type()}, 1, 8, kReading}});
    const int64_t count = indices.size(0);
    require(place.size(0) == count, "uniqueIndices", show(place), "a place for each coordinate");
    require(values.size(0) == count, "values", show(values), "a value for each coordinate");
    auto sizes = values.sizes().vec();
    sizes[0] = unique.size(0);
    require(new_values->sizes() == sizes, "newValues", show(*new_values),
            "the shape of values, as long as uniqueLen");
    require(new_indices->size(0) == sizes[0] && new_indices->size(1) == indices.size(1),
            "newIndices", show(*new_indices), "the shape of indices, as long as uniqueLen");
  }

  void run() const {
    expect_values(place, 0, unique.size(0), "uniqueIndices");
    const at::Tensor to = place.to(at::kLong);
    new_indices = at::zeros(new_indices->sizes(), indices.options()).index_copy(0, to, indices);
    new_values = at::zeros(new_values->sizes(), values.options()).index_add(0, to, values);
  }
};

}  // namespace

NAMED(aclnnCoalesceSparse, CoalesceSparse, all, check, run)

}  // namespace softnpu
