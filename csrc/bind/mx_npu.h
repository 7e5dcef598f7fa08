// MX-FP8 rows as the chip keeps them: the scales of two blocks lie together.
#pragma once

#include <ATen/ops/empty.h>

namespace dsv4::bind {

constexpr int64_t kMxBlock = 32;

// [.., K / 32] as [.., K / 64, 2].
inline at::Tensor paired(const at::Tensor& scale) {
  return scale.contiguous().unflatten(-1, {-1, 2});
}

// Room for e4m3 codes [.., K] and their e8m0 scales [.., K / 64, 2].
struct MxRows {
  at::Tensor codes, pairs;

  MxRows(at::IntArrayRef sizes, const at::TensorOptions& options)
      : codes(at::empty(sizes, options.dtype(at::kFloat8_e4m3fn))) {
    auto shape = sizes.vec();
    shape.back() /= 2 * kMxBlock;
    shape.push_back(2);
    pairs = at::empty(shape, options.dtype(at::kFloat8_e8m0fnu));
  }

  std::tuple<at::Tensor, at::Tensor> result() const { return {codes, pairs.flatten(-2)}; }
};

}  // namespace dsv4::bind
