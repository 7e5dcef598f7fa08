// How an operator is written: OP(aclnnMul, [](In a, In b, Out o) { o = at::mul(a, b); });
// The lambda's parameter types give the C signature of phase 1 (A.4 of the ABI notes); phase 2 is the same for all.
// The lambda is the kernel: it runs on the stream's thread, as often as a captured graph is replayed.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Scalar.h>

#include <charconv>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "softnpu/acl/report.h"
#include "softnpu/acl/tensor.h"

namespace softnpu {

// const aclTensor*; nullptr is refused, but a checked operator gets it undefined and its table decides.
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

// An output, or an argument that is changed: assigning stores with the output's dtype and strides; the shape must be
// right.
class Out {
 public:
  explicit Out(at::Tensor tensor) : tensor_(std::move(tensor)) {}
  void operator=(const at::Tensor& value) const;
  void operator=(const Out&) = delete;
  Out(const Out&) = default;
  const at::Tensor& operator*() const { return tensor_; }  // to read, or to write in place after touch()
  const at::Tensor* operator->() const { return &tensor_; }
  explicit operator bool() const { return tensor_.defined(); }
  void touch() const;  // "the kernel has written this"

 private:
  at::Tensor tensor_;
};
// An output that may be nullptr: test it before storing.
struct OptionalOut : Out {
  explicit OptionalOut(Out out) : Out(std::move(out)) {}
  using Out::operator=;
};
using Outs = const std::vector<Out>&;

// An output whose real size is known only when the kernel has run; phase 2 waits for it.
struct Growing {
  Out whole;  // of the largest possible size
  std::shared_ptr<std::vector<int64_t>> sizes;
  void operator=(const at::Tensor& value) const;
};

at::ScalarType scalar_type(int dtype);
inline at::ScalarType scalar_type(DType_ dtype) { return scalar_type(static_cast<int>(dtype)); }

// Everything that phase 1 collects while it converts arguments.
struct Builder {
  std::shared_ptr<Launch> launch;
  bool has_output = false;  // with at least one element
  std::vector<std::pair<aclTensor*, std::shared_ptr<std::vector<int64_t>>>> growing;

  Builder(const char* name, bool checked);
  at::Tensor tensor(const aclTensor* raw);         // null: undefined
  at::Tensor required(const aclTensor* raw);       // null: refused, unless the operator has a check of its own
  void* alias(const void* pointer, size_t bytes);  // where the kernel finds the bytes; checked again when it runs
  Out out(const aclTensor* raw);
  Out required_out(const aclTensor* raw);
  void note(const std::string& argument);

 private:
  void refuse_null(const aclTensor* raw) const;
  bool checked_;
  int tensors_ = 0;  // seen so far
  // A stream's thread writes in place what is made here, and it may not into an inference tensor of the caller's mode.
  c10::InferenceMode outside_{false};
};

at::Scalar scalar_value(const aclScalar* raw);

// How the trace shows an argument; a number in the fewest digits that read back as the same value.
inline std::string shown(double number) {
  char digits[64];
  const auto single = static_cast<float>(number);
  const auto end = static_cast<double>(single) == number ? std::to_chars(digits, digits + sizeof digits, single)
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
  for (size_t i = 0; i < values.size(); ++i) result += (i ? "," : "") + shown(static_cast<T>(values[i]));
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

// Converts one C argument of type Raw into what the kernel takes.
template <class Parameter>
struct Argument {  // numbers: the C type is the parameter's own
  using Raw = Parameter;
  using Value = Parameter;
  static Value take(Builder& b, Raw raw) { return noted(b, raw); }
};
template <>
struct Argument<In> {
  using Raw = const aclTensor*;
  using Value = at::Tensor;
  static Value take(Builder& b, Raw raw) { return b.required(raw); }
};
template <>
struct Argument<OptionalIn> {
  using Raw = const aclTensor*;
  using Value = std::optional<at::Tensor>;
  static Value take(Builder& b, Raw raw) {
    at::Tensor tensor = b.tensor(raw);
    return raw ? Value(std::move(tensor)) : Value();
  }
};
template <>
struct Argument<Out> {
  using Raw = const aclTensor*;
  using Value = Out;
  static Value take(Builder& b, Raw raw) { return b.required_out(raw); }
};
template <>
struct Argument<OptionalOut> {
  using Raw = const aclTensor*;
  using Value = OptionalOut;
  static Value take(Builder& b, Raw raw) { return OptionalOut(b.out(raw)); }
};
template <>
struct Argument<Growing> {
  using Raw = aclTensor*;
  using Value = Growing;
  static Value take(Builder& b, Raw raw) {
    Growing result{b.out(raw), std::make_shared<std::vector<int64_t>>()};
    b.growing.emplace_back(raw, result.sizes);
    return result;
  }
};
template <>
struct Argument<Ins> {
  using Raw = const aclTensorList*;
  using Value = std::vector<at::Tensor>;
  static Value take(Builder& b, Raw raw) {
    Value result;
    if (raw)
      for (const aclTensor* tensor : raw->tensors) result.push_back(b.required(tensor));
    return result;
  }
};
template <>
struct Argument<Outs> {
  using Raw = const aclTensorList*;
  using Value = std::vector<Out>;
  static Value take(Builder& b, Raw raw) {
    Value result;
    if (raw)
      for (const aclTensor* tensor : raw->tensors) result.push_back(b.out(tensor));
    return result;
  }
};
template <>
struct Argument<Ints> {
  using Raw = const aclIntArray*;
  using Value = std::vector<int64_t>;
  static Value take(Builder& b, Raw raw) { return noted(b, raw ? raw->values : Value()); }
};
template <>
struct Argument<OptionalInts> {
  using Raw = const aclIntArray*;
  using Value = std::optional<std::vector<int64_t>>;
  static Value take(Builder& b, Raw raw) { return noted(b, raw ? Value(raw->values) : Value()); }
};
template <>
struct Argument<Bools> {
  using Raw = const aclBoolArray*;
  using Value = std::vector<bool>;
  static Value take(Builder& b, Raw raw) { return noted(b, raw ? raw->values : Value()); }
};
template <>
struct Argument<Scalar> {
  using Raw = const aclScalar*;
  using Value = at::Scalar;
  static Value take(Builder& b, Raw raw) {
    if (!raw) throw Fault(kNnNullptr, "a scalar argument is null");
    return noted(b, scalar_value(raw));
  }
};
template <>
struct Argument<OptionalScalar> {
  using Raw = const aclScalar*;
  using Value = std::optional<at::Scalar>;
  static Value take(Builder& b, Raw raw) { return noted(b, raw ? Value(scalar_value(raw)) : Value()); }
};
template <>
struct Argument<Scalars> {
  using Raw = const aclScalarList*;
  using Value = std::vector<at::Scalar>;
  static Value take(Builder& b, Raw raw) {
    Value result;
    if (raw)
      for (const aclScalar* scalar : raw->scalars) result.push_back(scalar_value(scalar));
    return noted(b, std::move(result));
  }
};
template <>
struct Argument<Text> {
  using Raw = const char*;
  using Value = std::string;
  static Value take(Builder& b, Raw raw) { return noted<Value>(b, raw ? raw : ""); }
};
template <>
struct Argument<DType_> {
  using Raw = int;
  using Value = DType_;
  static Value take(Builder& b, Raw raw) { return noted(b, static_cast<DType_>(raw)); }
};

void set_kernel(Builder& builder, std::function<void()> kernel);
int finish(Builder& builder, std::function<void()> kernel, uint64_t* workspace, aclOpExecutor** executor);
int report_exception(const char* name);  // inside a catch block
int phase2(Call& call, void* workspace, uint64_t size, aclOpExecutor* executor, Handle stream);

struct NoCheck {
  template <class... Arguments>
  void operator()(const Arguments&...) const {}
};

template <class Op, class Signature>
struct Phase1;

template <class Op, class Lambda, class... Parameters>
struct Phase1<Op, void (Lambda::*)(Parameters...) const> {
  static int run(typename Argument<Parameters>::Raw... raw, uint64_t* workspace, aclOpExecutor** executor) {
    static constinit Call call{Op::name, "GetWorkspaceSize"};
    if (const int injected = call.enter()) return injected;
    try {
      int index = 0;
      (refuse_dead(raw, ++index), ...);
      Builder builder(Op::name, !std::is_same_v<decltype(Op::check), const NoCheck>);
      // Braces: converted from left to right, so that the trace lists arguments in order.
      std::tuple<typename Argument<Parameters>::Value...> values{Argument<Parameters>::take(builder, raw)...};
      std::apply(Op::check, values);
      return finish(builder, [values = std::move(values)] { std::apply(Op::kernel, values); }, workspace, executor);
    } catch (...) {
      return report_exception(Op::name);
    }
  }
};

using Unknown = int();  // the resolver picks the typed phase 1; the symbol itself has no type

// CHECKED(name, check, kernel): `check` has the kernel's parameters, runs in phase 1 and throws Fault(161002, ...).
#define SOFTNPU_OP(NAME, CHECK, ...)                                                           \
  namespace {                                                                                  \
  struct Op_##NAME {                                                                           \
    static constexpr const char* name = #NAME;                                                 \
    static constexpr auto check = CHECK;                                                       \
    static constexpr auto kernel = __VA_ARGS__;                                                \
  };                                                                                           \
  }                                                                                            \
  extern "C" Unknown* softnpu_phase1_##NAME() {                                                \
    using Typed = Phase1<Op_##NAME, decltype(&decltype(Op_##NAME::kernel)::operator())>;       \
    return reinterpret_cast<Unknown*>(reinterpret_cast<void*>(&Typed::run));                   \
  }                                                                                            \
  SOFTNPU_C int NAME##GetWorkspaceSize() __attribute__((ifunc("softnpu_phase1_" #NAME)));      \
  SOFTNPU_C int NAME(void* workspace, uint64_t size, aclOpExecutor* executor, Handle stream) { \
    static constinit Call call{#NAME};                                                         \
    return phase2(call, workspace, size, executor, stream);                                    \
  }

#define OP(NAME, ...) SOFTNPU_OP(NAME, NoCheck{}, __VA_ARGS__)
#define CHECKED(NAME, CHECK, ...) SOFTNPU_OP(NAME, CHECK, __VA_ARGS__)

}  // namespace softnpu
