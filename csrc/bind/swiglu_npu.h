// SwiGLU of integer sums as a step of a launcher.
#pragma once

#include <ATen/ops/empty.h>

#include "npu/activation.h"
#include "quant_npu.h"

namespace dsv4::bind {

constexpr double kPlainSilu = 1.0, kNoBias = 0.0;

// Sums [M, 2m] of gate and up to int8 rows with a scale each; counts: rows of each group.
inline Quantised activated(const NpuCall& call, const at::Tensor& sums,
                           const at::Tensor& weight_scale, const at::Tensor& row_scale,
                           const at::Tensor& counts, double limit) {
  using Swiglu = npu::DequantSwigluQuant;
  at::Tensor codes = at::empty({sums.size(0), sums.size(1) / 2}, sums.options().dtype(at::kChar));
  at::Tensor scale = at::empty({sums.size(0)}, row_scale.options());
  call.launch(Swiglu{call.in(sums),
                     call.maybe(&weight_scale),
                     call.maybe(&row_scale),
                     {},
                     {},
                     {},
                     call.maybe(&counts),
                     true,
                     {"dynamic"},
                     Swiglu::kInt8,
                     {"rint"},
                     Swiglu::kLastAxis,
                     Swiglu::kClampedHalves,
                     limit,
                     kPlainSilu,
                     kNoBias,
                     call.out(codes),
                     call.out(scale)});
  return {codes, scale};
}

// Rows [M, 2m] of gate and up to [M, m] in their dtype.
inline at::Tensor clipped(const NpuCall& call, const at::Tensor& both, double limit) {
  at::Tensor out = at::empty({both.size(0), both.size(1) / 2}, both.options());
  call.launch(npu::ClippedSwiglu{
      call.in(both), {}, int64_t{-1}, kPlainSilu, limit, kNoBias, false, call.out(out)});
  return out;
}

}  // namespace dsv4::bind
