#include "argument.h"

#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>

#include <stdexcept>

namespace dsv4::bind {
namespace {

// As Python writes a tuple.
std::string shape_of(const at::Tensor& tensor) {
  const auto sizes = c10::Join(", ", tensor.sizes());
  return c10::str("shape (", sizes, tensor.dim() == 1 ? ",)" : ")");
}

}  // namespace

void Argument::reject(const std::string& found, const std::string& expected) const {
  throw ArgumentError(op, name, found, expected);
}

void Argument::require_float() const {
  const auto type = tensor.scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) {
    reject(c10::str("torch.", c10::getDtypeNames(type).first), spec);
  }
}

void Argument::require_rank(int64_t rank) const {
  if (tensor.dim() != rank) {
    reject(shape_of(tensor), spec);
  }
}

void Argument::require_leading_dims() const {
  if (tensor.dim() < 1) {
    reject(shape_of(tensor), spec);
  }
}

void Argument::require_size(int64_t dim, const char* symbol, int64_t size) const {
  if (tensor.size(dim) != size) {
    reject(shape_of(tensor), c10::str(spec, " with ", symbol, " = ", size));
  }
}

void Argument::require_device_of(const at::Tensor& first) const {
  if (tensor.device() != first.device()) {
    reject(c10::str("device ", tensor.device()), c10::str(first.device(), " like the first tensor"));
  }
}

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

RowLayout rows_of(const at::Tensor& tensor) {
  return {{tensor.sizes().data(), tensor.sizes().size()}, {tensor.strides().data(), tensor.strides().size()}};
}

}  // namespace dsv4::bind
