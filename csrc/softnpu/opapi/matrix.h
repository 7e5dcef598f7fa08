// Matrices that an operator takes in rows and columns or in the NZ layout, of any type including
// the 4-bit ones.
#pragma once

#include "op.h"

namespace softnpu {

struct Matrix {
  at::ScalarType dtype = at::ScalarType::Undefined;
  std::vector<int64_t> sizes;  // in values, also for the 4-bit types
  bool nz = false;
  bool transposed = false;  // the rows lie together in memory
  at::Tensor stored;  // as it lies in memory: untransposed, tiled when nz, 4-bit types as bytes

  bool defined() const { return stored.defined(); }
  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t i) const { return sizes[static_cast<size_t>(i < 0 ? i + dim() : i)]; }
  at::Tensor read() const;  // values in rows and columns; 4-bit types become int8 or fp32
  Matrix operator[](int64_t i) const;  // one of a batch
  Matrix as_int4() const { return opened(at::kInt, at::kBits4x2); }
  Matrix opened(at::ScalarType outer, at::ScalarType inner) const;  // 32 bits are eight values of 4
};
using Matrix_ = const Matrix&;

Matrix take_matrix(Builder& b, const aclTensor* raw);
std::string show(Matrix_ x);

template <>
struct Argument<Matrix> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "const aclTensor*";
  static Matrix take(Builder& b, Raw raw) { return take_matrix(b, raw); }
};
template <>
struct Argument<std::vector<Matrix>> : TensorList<Matrix, take_matrix> {
  static constexpr const char* c_type = "const aclTensorList*";
};

}  // namespace softnpu
