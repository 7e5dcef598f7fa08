// MX-FP8 rows as the chip keeps them: the scales of two blocks lie together.
#pragma once

#include <ATen/ops/empty.h>

#include <utility>

#include "matmul_npu.h"
#include "npu/activation.h"
#include "npu/quant.h"
#include "npu_call.h"

namespace dsv4::bind {

constexpr int64_t kMxBlock = 32;

// [.., K / 32] as [.., K / 64, 2].
inline at::Tensor paired(const at::Tensor& scale) {
  return scale.contiguous().unflatten(-1, {-1, 2});
}

// Scales [.., N, K / 64, 2] of a weight as they lie, seen as the columns' are.
inline at::Tensor pairs_of_columns(const at::Tensor& scale) {
  return paired(scale).transpose(-3, -2);
}

// e4m3 codes [.., K] and their e8m0 scales [.., K / 64, 2].
struct MxRows {
  at::Tensor codes, pairs;

  MxRows(at::IntArrayRef sizes, const at::TensorOptions& options)
      : codes(at::empty(sizes, options.dtype(at::kFloat8_e4m3fn))) {
    auto shape = sizes.vec();
    shape.back() /= 2 * kMxBlock;
    shape.push_back(2);
    pairs = at::empty(shape, options.dtype(at::kFloat8_e8m0fnu));
  }

  MxRows(at::Tensor codes, at::Tensor pairs) : codes(std::move(codes)), pairs(std::move(pairs)) {}

  std::tuple<at::Tensor, at::Tensor> result() const { return {codes, pairs.flatten(-2)}; }
};

// Rows as operators have them: codes [.., K] and scales [.., K / 32].
inline MxRows mx_rows(const at::Tensor& codes, const at::Tensor& scale) {
  return {codes.contiguous(), paired(scale)};
}

// Rows x [.., K], contiguous, quantised by the rule of `act_quant`.
inline MxRows mx_quantised(const NpuCall& call, const at::Tensor& x) {
  constexpr double smallest_amax = 1e-4;
  MxRows rows(x.sizes(), x.options());
  call.launch(npu::DynamicMxQuant{call.in(x),
                                  npu::DynamicMxQuant::kLastAxis,
                                  {"rint"},
                                  {npu::AclType::e4m3},
                                  kMxBlock,
                                  npu::DynamicMxQuant::kRoundedUp,
                                  0.0,
                                  smallest_amax,
                                  call.out(rows.codes),
                                  call.out(rows.pairs)});
  return rows;
}

// Halves gate and up of x [M, 2m], contiguous, through the clamped SwiGLU.
inline MxRows mx_activated(const NpuCall& call, const at::Tensor& x, double limit) {
  MxRows made({x.size(0), x.size(1) / 2}, x.options());
  const at::Tensor no_origin =
      at::empty(made.codes.sizes(), x.options());  // asked for all the same
  call.launch(npu::SwigluGroupQuant{call.in(x),
                                    {},
                                    {},
                                    {},
                                    static_cast<int64_t>(npu::AclType::e4m3),
                                    npu::SwigluGroupQuant::kMx,
                                    kMxBlock,
                                    true,
                                    limit,
                                    0.0,
                                    false,
                                    call.out(made.codes),
                                    call.out(made.pairs),
                                    call.out(no_origin)});
  return made;
}

// bf16 rows x [M, K] sorted by group, each times the FP4 weight [N, K] of its group, in tiles [E,
// K / 32, N / 16, 16, 16] with scales [E, N, K / 32].
at::Tensor tiled_product(const NpuCall& call, const MxRows& x, const at::Tensor& tiles,
                         const at::Tensor& weight_scale, const Groups& groups);

}  // namespace dsv4::bind
