// Quantisers as a step of a launcher.
#pragma once

#include <ATen/ops/empty.h>

#include "npu/quant.h"
#include "npu_call.h"

namespace dsv4::bind {

using Quantised = std::tuple<at::Tensor, at::Tensor>;

// Codes of x [.., K] in int8 or e4m3, and one fp32 scale per row [..]: amax / 127, or amax / 448.
inline Quantised token_quantised(const NpuCall& call, const at::Tensor& x, at::ScalarType type) {
  at::Tensor codes = at::empty(x.sizes(), x.options().dtype(type));
  at::Tensor scale = at::empty(x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)),
                               x.options().dtype(at::kFloat));
  call.launch(npu::DynamicQuant{
      call.in(x), {}, {}, {acl_type(type)}, call.out(codes), call.out(scale), {}});
  return {codes, scale};
}

}  // namespace dsv4::bind
