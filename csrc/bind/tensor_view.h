// What kernels read of a tensor, and the conditions that most of their predicates share.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dtype.h"
#include "common/indices.h"
#include "common/row_layout.h"
#include "registry.h"

namespace dsv4::bind {

// The element type of a tensor that kernels read: fp32, bf16 or fp16.
DType dtype_of(const at::Tensor& tensor);

// A new CPU tensor of the same shape and dtype; what at::empty makes, without its dispatch.
at::Tensor like(const at::Tensor& tensor);

// The same of any shape and dtype; and of a tensor's leading dimensions with another last one.
at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype);
at::Tensor with_last(const at::Tensor& tensor, int64_t size, at::ScalarType dtype);

RowLayout rows_of(const at::Tensor& tensor);

// Of an int32 or int64 tensor.
Indices indices_of(const at::Tensor& tensor);

// Why a float kernel over rows of adjacent elements does not run a tensor.
WhyNot not_float_rows(const char* name, const at::Tensor& tensor);

// Why a kernel does not read values of fp32, in whose place contracts take fp64 so that gradients
// can be checked; strides are any.
WhyNot not_single(const char* name, const at::Tensor& tensor);

// Why a kernel over rows of adjacent elements of any dtype does not run a tensor.
WhyNot not_adjacent_elements(const char* name, const at::Tensor& tensor);

// Why a kernel that copies what lies at each index of the first dimension as bytes does not run a
// tensor.
WhyNot not_adjacent_rows(const char* name, const at::Tensor& tensor);

}  // namespace dsv4::bind
