#include "slice.h"

#include <ATen/ops/flip.h>

namespace softnpu {
namespace {

bool bit(int64_t mask, size_t i) { return mask >> i & 1; }

// The first index and the count of one axis; CPU slices go forwards, so a negative stride is
// turned round.
struct Range {
  int64_t first, count, step;
};
Range range_of(int64_t size, int64_t begin, int64_t end, int64_t step) {
  const auto within = [size](int64_t i, int64_t low, int64_t high) {
    return std::clamp(i < 0 ? i + size : i, low, high);
  };
  const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? size : size - 1;
  const int64_t from = within(begin, low, high), to = within(end, low, high);
  const int64_t count = step > 0 ? (to - from + step - 1) / step : (to - from + step + 1) / step;
  return {from, std::max<int64_t>(count, 0), step};
}

at::Tensor along(In x, int64_t axis, const Range& r) {
  if (r.count == 0) return x.narrow(axis, 0, 0);
  const int64_t last = r.first + (r.count - 1) * r.step;
  const at::Tensor part =
      x.slice(axis, std::min(r.first, last), std::max(r.first, last) + 1, std::abs(r.step));
  return r.step < 0 ? at::flip(part, {axis}) : part;
}

}  // namespace

at::Tensor strided_slice(In x, Ints begin, Ints end, Ints strides, const SliceMasks& masks) {
  if (begin.size() != strides.size() || end.size() != strides.size())
    throw Fault(kNnParameter, "begin, end and strides of different lengths");
  int64_t consumed = 0;  // axes of x that entries other than the ellipsis speak of
  for (size_t i = 0; i < strides.size(); ++i)
    consumed += !bit(masks.ellipsis, i) && !bit(masks.new_axis, i);
  if (consumed > x.dim()) throw Fault(kNnParameter, "more slices than dimensions");
  at::Tensor result = x;
  int64_t axis = 0;
  for (size_t i = 0; i < strides.size(); ++i) {
    if (bit(masks.ellipsis, i)) {
      axis += x.dim() - consumed;
    } else if (bit(masks.new_axis, i)) {
      result = result.unsqueeze(axis++);
    } else if (bit(masks.shrink_axis, i)) {
      result = result.select(axis, begin[i]);
    } else {
      if (strides[i] == 0) throw Fault(kNnParameter, "a stride of 0");
      const int64_t size = result.size(axis);
      Range r = range_of(size, begin[i], end[i], strides[i]);
      const bool forwards = strides[i] > 0;
      if (bit(masks.begin, i) || bit(masks.end, i)) {
        const int64_t first = forwards ? 0 : size - 1, behind = forwards ? size : -size - 1;
        r = range_of(size, bit(masks.begin, i) ? first : begin[i],
                     bit(masks.end, i) ? behind : end[i], strides[i]);
      }
      result = along(result, axis++, r);
    }
  }
  return result;
}

OP(aclnnStridedSlice,
   [](In x, Ints begin, Ints end, Ints strides, int64_t begin_mask, int64_t end_mask,
      int64_t ellipsis_mask, int64_t new_axis_mask, int64_t shrink_axis_mask, Out o) {
     o = strided_slice(x, begin, end, strides,
                       {begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_axis_mask});
   })

}  // namespace softnpu
