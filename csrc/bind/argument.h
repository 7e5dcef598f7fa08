// Checks of operator arguments. Every complaint says operator, argument, found and expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "common/dtype.h"
#include "common/error.h"
#include "common/row_layout.h"

namespace dsv4::bind {

// A tensor argument with its names. `spec` is the contract's specification line, for the message.
struct Argument {
  const char* op;
  const char* name;
  const char* spec;
  const at::Tensor& tensor;

  void require_float() const;
  void require_rank(int64_t rank) const;
  void require_leading_dims() const;  // at least the row itself
  void require_size(int64_t dim, const char* symbol, int64_t size) const;
  void require_device_of(const at::Tensor& first) const;

  [[noreturn]] void reject(const std::string& found, const std::string& expected) const;
};

// The element type of a tensor that kernels read: fp32, bf16 or fp16.
DType dtype_of(const at::Tensor& tensor);

RowLayout rows_of(const at::Tensor& tensor);

}  // namespace dsv4::bind
