#include "tensor_view.h"

#include <ATen/EmptyTensor.h>

#include <stdexcept>

namespace dsv4::bind {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      throw std::logic_error("a kernel was given a dtype that its predicate does not admit");
  }
}

at::Tensor like(const at::Tensor& tensor) {
  return at::Tensor(at::detail::empty_cpu(tensor.sizes(), tensor.options()));
}

at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::Tensor(at::detail::empty_cpu(sizes, at::TensorOptions(dtype)));
}

at::Tensor with_last(const at::Tensor& tensor, int64_t size, at::ScalarType dtype) {
  c10::SmallVector<int64_t, 5> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = size;
  return new_tensor(sizes, dtype);
}

RowLayout rows_of(const at::Tensor& tensor) {
  return {{tensor.sizes().data(), tensor.sizes().size()},
          {tensor.strides().data(), tensor.strides().size()}};
}

Indices indices_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kLong};
}

WhyNot not_single(const char* name, const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) {
    return std::nullopt;
  }
  return std::string(name) + " is float64, which only the reference computes";
}

WhyNot not_float_rows(const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  if (type == at::kDouble) {
    return std::string(name) + " is float64, which only the reference computes";
  }
  if (tensor.layout() != at::kStrided) {
    return std::string(name) + " is not a strided tensor";
  }
  return not_adjacent_elements(name, tensor);
}

WhyNot not_adjacent_elements(const char* name, const at::Tensor& tensor) {
  if (tensor.dim() > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    return std::string(name) + "'s last dimension is not contiguous";
  }
  return std::nullopt;
}

WhyNot not_adjacent_rows(const char* name, const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided) {
    return std::string(name) + " is not a strided tensor";
  }
  int64_t elements = 1;
  for (int64_t dim = tensor.dim(); dim-- > 1;) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != elements) {
      return std::string(name) + "'s rows are not contiguous";
    }
    elements *= tensor.size(dim);
  }
  return std::nullopt;
}

}  // namespace dsv4::bind
