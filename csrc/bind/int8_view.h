// Rows and weights of int8 codes with scales, as kernels read them.
#pragma once

#include "cpu/int8_product.h"
#include "tensor_view.h"

namespace dsv4::bind {

// Why a kernel does not run codes and their scales; strides of scales are any.
inline WhyNot not_int8_rows(const char* name, const at::Tensor& codes, const at::Tensor& scale) {
  if (scale.scalar_type() == at::kDouble) {
    return std::string(name) + "_scale is float64, which only the reference computes";
  }
  return not_adjacent_elements(name, codes);
}

inline WhyNot not_offsets(const at::Tensor& offsets) {
  if (!offsets.is_contiguous()) return "expert_offsets is not contiguous";
  return std::nullopt;
}

// x [T, K], scale [T] or none.
inline cpu::Int8Rows int8_rows(const at::Tensor& x, const at::Tensor* scale) {
  return {x.const_data_ptr<int8_t>(), x.stride(0), nullptr,
          scale != nullptr ? scale->const_data_ptr<float>() : nullptr,
          scale != nullptr ? scale->stride(0) : 0};
}

// weight [N, K] with a scale [N], or with one more dimension in front, of experts; no scale: none.
inline cpu::Int8Weight int8_weight(const at::Tensor& weight, const at::Tensor* scale) {
  const bool grouped = weight.dim() == 3;
  cpu::Int8Weight result{.codes = weight.const_data_ptr<int8_t>(),
                         .expert_stride = grouped ? weight.stride(0) : 0,
                         .row_stride = weight.stride(-2),
                         .scale_dtype = DType::f32,
                         .scale = nullptr,
                         .scale_expert_stride = 0,
                         .scale_stride = 0};
  if (scale != nullptr) {
    result.scale_dtype = dtype_of(*scale);
    result.scale = scale->const_data_ptr();
    result.scale_expert_stride = grouped ? scale->stride(0) : 0;
    result.scale_stride = scale->stride(-1);
  }
  return result;
}

}  // namespace dsv4::bind
