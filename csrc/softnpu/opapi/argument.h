// What phase 1 gets from C and what a kernel gets instead: tensors as at::Tensor on the device's
// memory, and so on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Scalar.h>

#include <charconv>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "softnpu/acl/report.h"
#include "softnpu/acl/tensor.h"

namespace softnpu {

// const aclTensor*; nullptr is refused, but a checked operator gets it undefined and its table
// decides.
using In = const at::Tensor&;
using OptionalIn = const std::optional<at::Tensor>&;  // const aclTensor*, which may be nullptr
using Ins = const std::vector<at::Tensor>&;           // const aclTensorList*
using Ints = const std::vector<int64_t>&;             // const aclIntArray*
using OptionalInts = const std::optional<std::vector<int64_t>>&;
using Bools = const std::vector<bool>&;  // const aclBoolArray*
using Scalar = const at::Scalar&;        // const aclScalar*
using OptionalScalar = const std::optional<at::Scalar>&;
using Scalars = const std::vector<at::Scalar>&;  // const aclScalarList*
using Text = const std::string&;                 // const char*
enum class DType_ : int {};                      // aclDataType by value

// An output, or an argument that is changed: assigning stores with the output's dtype and strides;
// the shape must be right.
class SOFTNPU_CXX Out {
 public:
  Out() = default;
  explicit Out(at::Tensor tensor) : tensor_(std::move(tensor)) {}
  void operator=(const at::Tensor& value) const;
  void operator=(const Out&) = delete;
  Out(const Out&) = default;
  const at::Tensor& operator*() const {
    return tensor_;
  }  // to read, or to write in place after touch()
  const at::Tensor* operator->() const { return &tensor_; }
  explicit operator bool() const { return tensor_.defined(); }
  void touch() const;  // "the kernel has written this"

 private:
  at::Tensor tensor_;
};
// An output that may be nullptr: test it before storing.
struct OptionalOut : Out {
  OptionalOut() = default;
  explicit OptionalOut(Out out) : Out(std::move(out)) {}
  using Out::operator=;
};
using Outs = const std::vector<Out>&;

// An output whose real size is known only when the kernel has run; phase 2 waits for it.
struct SOFTNPU_CXX Growing {
  Out whole;  // of the largest possible size
  std::shared_ptr<std::vector<int64_t>> sizes;
  void operator=(const at::Tensor& value) const;
};

SOFTNPU_CXX at::ScalarType scalar_type(int dtype);
inline at::ScalarType scalar_type(DType_ dtype) { return scalar_type(static_cast<int>(dtype)); }

// Everything that phase 1 collects while it converts arguments.
struct SOFTNPU_CXX Builder {
  std::shared_ptr<Launch> launch;
  bool has_output = false;  // with at least one element
  std::vector<std::pair<aclTensor*, std::shared_ptr<std::vector<int64_t>>>> growing;

  Builder(const char* name, bool checked);
  at::Tensor tensor(const aclTensor* raw);  // null: undefined
  at::Tensor required(
      const aclTensor* raw);  // null: refused, unless the operator has a check of its own
  void* alias(const void* pointer,
              size_t bytes);  // where the kernel finds the bytes; checked again when it runs
  Out out(const aclTensor* raw);
  Out required_out(const aclTensor* raw);
  void note(const std::string& argument);

 private:
  void refuse_null(const aclTensor* raw) const;
  bool checked_;
  int tensors_ = 0;  // seen so far
  // A stream's thread writes in place what is made here, and it may not into an inference tensor of
  // the caller's mode.
  c10::InferenceMode outside_{false};
};

SOFTNPU_CXX at::Scalar scalar_value(const aclScalar* raw);

// How the trace shows an argument; a number in the fewest digits that read back as the same value.
inline std::string shown(double number) {
  char digits[64];
  const auto single = static_cast<float>(number);
  const auto end = static_cast<double>(single) == number
                       ? std::to_chars(digits, digits + sizeof digits, single)
                       : std::to_chars(digits, digits + sizeof digits, number);
  return std::string(digits, end.ptr);
}
inline std::string shown(float number) { return shown(static_cast<double>(number)); }
inline std::string shown(bool truth) { return truth ? "true" : "false"; }
template <class Integer>
  requires std::is_integral_v<Integer>
std::string shown(Integer number) {
  return std::to_string(number);
}
inline std::string shown(const at::Scalar& scalar) {
  if (scalar.isBoolean()) return shown(scalar.toBool());
  if (scalar.isIntegral(false)) return shown(scalar.toLong());
  if (!scalar.isComplex()) return shown(scalar.toDouble());
  const auto value = scalar.toComplexDouble();
  return "(" + shown(value.real()) + "," + shown(value.imag()) + ")";
}
inline std::string shown(const std::string& text) { return '"' + text + '"'; }
inline std::string shown(DType_ dtype) { return dtype_name(static_cast<int>(dtype)); }
template <class T>
std::string shown(const std::vector<T>& values) {
  std::string result = "[";
  for (size_t i = 0; i < values.size(); ++i)
    result += (i ? "," : "") + shown(static_cast<T>(values[i]));
  return result + "]";
}
template <class T>
std::string shown(const std::optional<T>& value) {
  return value ? shown(*value) : "none";
}

template <class T>
T noted(Builder& b, T value) {
  if (tracing()) b.note(shown(value));
  return value;
}

// Converts one C argument of type Raw into a Value; c_type is its name in CANN's headers.
template <class Value>
struct Argument {  // numbers: the C type is their own
  using Raw = Value;
  static constexpr const char* c_type = std::is_same_v<Value, bool>       ? "bool"
                                        : std::is_same_v<Value, int>      ? "int"
                                        : std::is_same_v<Value, int8_t>   ? "int8_t"
                                        : std::is_same_v<Value, int64_t>  ? "int64_t"
                                        : std::is_same_v<Value, uint64_t> ? "uint64_t"
                                        : std::is_same_v<Value, float>    ? "float"
                                                                          : "double";
  static Value take(Builder& b, Raw raw) {
    static_assert(std::is_arithmetic_v<Value>);
    return noted(b, raw);
  }
};
template <>
struct Argument<at::Tensor> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "const aclTensor*";
  static at::Tensor take(Builder& b, Raw raw) { return b.required(raw); }
};
template <>
struct Argument<std::optional<at::Tensor>> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "const aclTensor*";
  static std::optional<at::Tensor> take(Builder& b, Raw raw) {
    at::Tensor tensor = b.tensor(raw);
    return raw ? std::optional(std::move(tensor)) : std::nullopt;
  }
};
template <>
struct Argument<Out> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "aclTensor*";
  static Out take(Builder& b, Raw raw) { return b.required_out(raw); }
};
template <>
struct Argument<OptionalOut> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "aclTensor*";
  static OptionalOut take(Builder& b, Raw raw) { return OptionalOut(b.out(raw)); }
};
template <>
struct Argument<Growing> {
  using Raw = aclTensor*;
  static constexpr const char* c_type = "aclTensor*";
  static Growing take(Builder& b, Raw raw) {
    Growing result{b.out(raw), std::make_shared<std::vector<int64_t>>()};
    b.growing.emplace_back(raw, result.sizes);
    return result;
  }
};
template <class Value, Value (*take_one)(Builder&, const aclTensor*)>
struct TensorList {
  using Raw = const aclTensorList*;
  static std::vector<Value> take(Builder& b, Raw raw) {
    std::vector<Value> result;
    if (raw)
      for (const aclTensor* tensor : raw->tensors) result.push_back(take_one(b, tensor));
    return result;
  }
};
inline at::Tensor take_required(Builder& b, const aclTensor* raw) { return b.required(raw); }
inline Out take_out(Builder& b, const aclTensor* raw) { return b.out(raw); }
template <>
struct Argument<std::vector<at::Tensor>> : TensorList<at::Tensor, take_required> {
  static constexpr const char* c_type = "const aclTensorList*";
};
template <>
struct Argument<std::vector<Out>> : TensorList<Out, take_out> {
  static constexpr const char* c_type = "aclTensorList*";
};
template <>
struct Argument<std::vector<int64_t>> {
  using Raw = const aclIntArray*;
  static constexpr const char* c_type = "const aclIntArray*";
  static std::vector<int64_t> take(Builder& b, Raw raw) {
    return noted(b, raw ? raw->values : std::vector<int64_t>());
  }
};
template <>
struct Argument<std::optional<std::vector<int64_t>>> {
  using Raw = const aclIntArray*;
  static constexpr const char* c_type = "const aclIntArray*";
  static std::optional<std::vector<int64_t>> take(Builder& b, Raw raw) {
    return noted(b, raw ? std::optional(raw->values) : std::nullopt);
  }
};
template <>
struct Argument<std::vector<bool>> {
  using Raw = const aclBoolArray*;
  static constexpr const char* c_type = "const aclBoolArray*";
  static std::vector<bool> take(Builder& b, Raw raw) {
    return noted(b, raw ? raw->values : std::vector<bool>());
  }
};
template <>
struct Argument<at::Scalar> {
  using Raw = const aclScalar*;
  static constexpr const char* c_type = "const aclScalar*";
  static at::Scalar take(Builder& b, Raw raw) {
    if (!raw) throw Fault(kNnNullptr, "a scalar argument is null");
    return noted(b, scalar_value(raw));
  }
};
template <>
struct Argument<std::optional<at::Scalar>> {
  using Raw = const aclScalar*;
  static constexpr const char* c_type = "const aclScalar*";
  static std::optional<at::Scalar> take(Builder& b, Raw raw) {
    return noted(b, raw ? std::optional(scalar_value(raw)) : std::nullopt);
  }
};
template <>
struct Argument<std::vector<at::Scalar>> {
  using Raw = const aclScalarList*;
  static constexpr const char* c_type = "const aclScalarList*";
  static std::vector<at::Scalar> take(Builder& b, Raw raw) {
    std::vector<at::Scalar> result;
    if (raw)
      for (const aclScalar* scalar : raw->scalars) result.push_back(scalar_value(scalar));
    return noted(b, std::move(result));
  }
};
template <>
struct Argument<std::string> {
  using Raw = const char*;
  static constexpr const char* c_type = "const char*";
  static std::string take(Builder& b, Raw raw) { return noted<std::string>(b, raw ? raw : ""); }
};
template <>
struct Argument<DType_> {
  using Raw = int;
  static constexpr const char* c_type = "aclDataType";
  static DType_ take(Builder& b, Raw raw) { return noted(b, static_cast<DType_>(raw)); }
};

}  // namespace softnpu
