// What kernels read of a tensor, and the conditions that most of their predicates share.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dtype.h"
#include "common/row_layout.h"
#include "registry.h"

namespace dsv4::bind {

// The element type of a tensor that kernels read: fp32, bf16 or fp16.
DType dtype_of(const at::Tensor& tensor);

// A new CPU tensor of the same shape and dtype; what at::empty makes, without its dispatch.
at::Tensor like(const at::Tensor& tensor);

RowLayout rows_of(const at::Tensor& tensor);

// Why a float kernel over rows of adjacent elements does not run a tensor.
WhyNot not_float_rows(const char* name, const at::Tensor& tensor);

}  // namespace dsv4::bind
