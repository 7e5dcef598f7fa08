// Updates of parts of a tensor, an attention update between rings, and the device's pause.
#include <ATen/ops/maximum.h>
#include <ATen/ops/round.h>

#include <chrono>
#include <thread>

#include "fused_quant.h"

namespace softnpu {
namespace {

// Rows of `flat` that an index of the first `index.size(-1)` dimensions names; a fault outside.
at::Tensor flat_rows(In x, In index) {
  const at::Tensor wide = index.to(at::kLong);
  at::Tensor row = wide.select(-1, 0).mul(0);
  for (int64_t axis = 0; axis < wide.size(-1); ++axis) {
    const at::Tensor one = wide.select(-1, axis);
    expect_values(one, 0, x.size(axis), "indices");
    row = row.mul(x.size(axis)).add(one);
  }
  return row.reshape({-1});
}

void scatter_nd(const Out& x, In indices, In updates) {
  const int64_t axes = indices.size(-1);
  const auto inner = x->sizes().slice(static_cast<size_t>(axes));
  std::vector<int64_t> sizes = inner.vec();
  sizes.insert(sizes.begin(), -1);
  const at::Tensor rows = flat_rows(*x, indices);
  at::Tensor whole = x->reshape(sizes).clone();
  x = whole.index_copy_(0, rows, updates.to(x->scalar_type()).reshape(sizes)).view(x->sizes());
}

// mirror-cann/ops-nn index/scatter/docs/aclnnInplaceScatterUpdate.md: each batch has its own place
// along the axis, or (pairs) a batch and a place.
void scatter_update(const Out& x, In indices, In updates, int64_t axis) {
  const int64_t dim = axis < 0 ? axis + x->dim() : axis, length = updates.size(dim);
  const at::Tensor places = indices.to(at::kLong);
  x.touch();
  for (int64_t row = 0; row < updates.size(0); ++row) {
    const bool pairs = places.dim() == 2;
    const at::Tensor batch = pairs ? places[row][0] : places.reshape({-1})[0].mul(0).add(row);
    const at::Tensor place = pairs ? places[row][1] : places.reshape({-1})[row];
    expect_values(batch, 0, x->size(0), "indices");
    expect_values(place, 0, x->size(dim) - length + 1, "indices");
    x->select(0, batch.item<int64_t>())
        .narrow(dim - 1, place.item<int64_t>(), length)
        .copy_(updates.select(0, row));
  }
}

}  // namespace

OP(aclnnScatterNdUpdate, [](Out x, In indices, In updates) { scatter_nd(x, indices, updates); })
OP(aclnnInplaceScatterUpdate,
   [](Out x, In indices, In updates, int64_t axis) { scatter_update(x, indices, updates, axis); })
// docs of torch_npu.npu_quant_scatter_: updates / scale + zero point, as int8.
OP(aclnnInplaceQuantScatter, [](Out x, In indices, In updates, In scales, OptionalIn zero_points,
                                int64_t axis, int64_t quant_axis, int64_t) {
  if (quant_axis != -1 && quant_axis != updates.dim() - 1)
    throw Fault(kNnParameter, "quantAxis: found " + text(quant_axis) + ", expected -1");
  at::Tensor quotient = updates.to(kF32).div(scales.to(kF32));
  if (zero_points) quotient = quotient.add(zero_points->to(kF32));
  scatter_update(x, indices, at::round(quotient).clamp(-128, 127).to(kI8), axis);
})

namespace {

// Weights [.., 8] of equal values, for the rows of an attention result [T, N, D] or [S, B, N * D].
at::Tensor over_rows(In weight, In attention, bool sbh) {
  const at::Tensor one = weight.select(-1, 0);
  if (!sbh) return one.unsqueeze(-1);
  const int64_t width = attention.size(2) / one.size(1);
  return one.permute({2, 0, 1}).repeat_interleave(width, 2);
}

}  // namespace

// mirror-cann/ops-transformer attention/ring_attention_update/docs/aclnnRingAttentionUpdateV2.md
OP(aclnnRingAttentionUpdateV2,
   [](In previous, In previous_max, In previous_sum, In current, In current_max, In current_sum,
      OptionalIn, Text layout, Text softmax_layout, Out attention, Out softmax_max,
      Out softmax_sum) {
     if (layout == "TND" && softmax_layout != "TND")
       throw Fault(kNnParameter, "inputSoftmaxLayout: found '" + softmax_layout +
                                     "', expected TND (the others are not emulated)");
     const at::Tensor most = at::maximum(previous_max, current_max);
     const at::Tensor before = previous_sum.mul(previous_max.sub(most).exp()),
                      now = current_sum.mul(current_max.sub(most).exp());
     const at::Tensor sum = before.add(now);
     const auto part = [&](In x, In weight) {
       return x.to(kF32).mul(over_rows(weight.div(sum), x, layout == "SBH"));
     };
     softmax_max = most, softmax_sum = sum;
     attention = part(previous, before).add(part(current, now));
   })

// mirror-cann/ops-nn experimental/control/sleep: cycles of a clock of 1.65 GHz; torch_npu 2.13
// sends an array of one.
OP(aclnnSleep, [](Ints cycles) {
  const double seconds = cycles.empty() ? 0 : static_cast<double>(cycles[0]) / 1.65e9;
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
})

}  // namespace softnpu
