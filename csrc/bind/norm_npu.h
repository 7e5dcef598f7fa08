// RMSNorm as a step of a launcher.
#pragma once

#include <ATen/ops/empty.h>

#include "npu/norm.h"
#include "npu_call.h"

namespace dsv4::bind {

// Sizes of x with one channel.
inline std::vector<int64_t> one_each(const at::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = 1;
  return sizes;
}

// Rows of x [.., D] normed and times the weight [D], rounded once, into y of x's shape.
inline void norm_into(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                      double eps, const at::Tensor& y) {
  const bool fits = weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat;
  const at::Tensor gamma = fits ? weight : weight.to(at::kFloat);
  const at::Tensor rstd = at::empty(one_each(x), x.options().dtype(at::kFloat));
  call.launch(npu::RmsNorm{call.in(x), call.in(gamma), eps, call.out(y), call.out(rstd)});
}

inline at::Tensor normed(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                         double eps) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  norm_into(call, x, weight, eps, y);
  return y;
}

}  // namespace dsv4::bind
