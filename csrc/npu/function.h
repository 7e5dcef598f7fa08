// How a launcher names an aclnn function: a struct of its arguments in C order, listed once.
//
//   struct RmsNorm {
//     static constexpr const char* symbol = "aclnnRmsNorm";
//     static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
//     In x, gamma;
//     Real eps;
//     Out y, rstd;
//     DSV4_ARGUMENTS(x, gamma, eps, y, rstd)
//   };
//
// The C signature follows from the list. It is published under the names, so that a test can hold
// it against what the other side declares: the ABI itself carries no types, and a call through a
// wrong one is not refused.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "acl.h"
#include "machine.h"

namespace dsv4::npu {

// A strided tensor in device memory. The spans must live until the launch is prepared.
struct View {
  void* storage = nullptr;
  int64_t storage_elements = 0;
  AclType type = AclType::f32;
  std::span<const int64_t> sizes;
  std::span<const int64_t> strides;
  int64_t offset = 0;  // in elements
  AclFormat format = AclFormat::nd;
  std::span<const int64_t> tiles = {};  // sizes of the storage, where the format has tiles
};

// Kinds of arguments; `c_type` as CANN's documents write them, without const for what is written.
struct In {
  static constexpr const char* c_type = "const aclTensor*";
  View view;
};
struct OptionalIn {
  static constexpr const char* c_type = "const aclTensor*";
  std::optional<View> view;
};
struct Out {
  static constexpr const char* c_type = "aclTensor*";
  View view;
};
struct OptionalOut {
  static constexpr const char* c_type = "aclTensor*";
  std::optional<View> view;
};
struct InList {  // absent without views
  static constexpr const char* c_type = "const aclTensorList*";
  std::vector<View> views;
};
struct OutList {
  static constexpr const char* c_type = "aclTensorList*";
  std::vector<View> views;
};
struct Ints {
  static constexpr const char* c_type = "const aclIntArray*";
  std::vector<int64_t> values;
};
struct OptionalInts {  // absent without values
  static constexpr const char* c_type = "const aclIntArray*";
  std::vector<int64_t> values;
};
struct Scalar {
  static constexpr const char* c_type = "const aclScalar*";
  float value;
};
struct Text {
  static constexpr const char* c_type = "const char*";
  const char* value;
};
struct DataType {
  static constexpr const char* c_type = "aclDataType";
  AclType value;
};
// Numbers take exactly their own type: an int where CANN reads a double is silent nonsense.
template <class T>
inline constexpr const char* kNumberType = nullptr;
template <>
inline constexpr const char* kNumberType<double> = "double";
template <>
inline constexpr const char* kNumberType<float> = "float";
template <>
inline constexpr const char* kNumberType<int64_t> = "int64_t";
template <>
inline constexpr const char* kNumberType<int32_t> = "int";
template <>
inline constexpr const char* kNumberType<int8_t> = "int8_t";
template <>
inline constexpr const char* kNumberType<bool> = "bool";

template <class T>
struct Number {
  static constexpr const char* c_type = kNumberType<T>;
  template <std::same_as<T> Same>
  constexpr Number(Same value) : value(value) {}
  T value;
};
using Real = Number<double>;
using Single = Number<float>;
using Int = Number<int64_t>;
using Int32 = Number<int32_t>;
using Int8 = Number<int8_t>;
using Flag = Number<bool>;

#define DSV4_ARGUMENTS(...)                               \
  static constexpr std::string_view names = #__VA_ARGS__; \
  auto arguments() const { return std::tie(__VA_ARGS__); }

inline constexpr uint8_t kA2 = static_cast<uint8_t>(Generation::a2);
inline constexpr uint8_t kA3 = static_cast<uint8_t>(Generation::a3);
inline constexpr uint8_t kA5 = static_cast<uint8_t>(Generation::a5);
inline constexpr uint8_t kAllChips = kA2 | kA3 | kA5;

// Where documents say that a function exists: in a package, on chips, from a CANN on.
struct Version {
  Package package;
  uint8_t chips;
  CannVersion since;
};

// Both phases of a function, and the package they are of.
struct Resolved {
  void* phase1 = nullptr;
  Phase2 phase2 = nullptr;
  Package package = Package::builtin;
};

// Why a machine cannot call a function with these versions; empty when it can.
std::string missing(const char* symbol, std::span<const Version> versions, const Machine& machine);
// Where documents place a function: "builtin on A5 from CANN 9.0 on; ..."
std::string documented(std::span<const Version> versions);
// The package in which documents place it on a machine's chip and CANN; empty where they do not.
std::string expected(std::span<const Version> versions, const Machine& machine);
// The first version that the machine has; phase1 is nullptr where there is none.
Resolved resolve(const char* symbol, std::span<const Version> versions, const Machine& machine);

// LaunchError where there is none.
Resolved resolve_or_throw(const char* symbol, std::span<const Version> versions,
                          const Machine& machine);

// "const aclTensor* x, double eps"
std::string declared(std::span<const char* const> types, std::string_view names);

template <class... Arguments>
std::string declared_by(const std::tuple<Arguments...>*, std::string_view names) {
  const std::array<const char*, sizeof...(Arguments)> types = {
      std::remove_cvref_t<Arguments>::c_type...};
  return declared(types, names);
}

// One line of the table of functions that launchers may call.
struct Listed {
  const char* symbol;
  std::span<const Version> versions;
  std::string (*signature)();
};
std::vector<Listed>& listed();

// A file-scope object of this type puts a function into the table while the extension loads.
template <class Function>
struct List {
  List() {
    listed().push_back({Function::symbol, Function::versions, [] {
                          using Arguments = decltype(std::declval<const Function&>().arguments());
                          return declared_by(static_cast<const Arguments*>(nullptr),
                                             Function::names);
                        }});
  }
};

}  // namespace dsv4::npu
