// The two phases of an aclnn function: phase 1, with everything that can fail, here; phase 2 in
// torch_npu's queue.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <tuple>

#include "function.h"
#include "queue.h"

namespace dsv4::npu {

// What a launch needs of the caller's framework.
struct Site {
  const char* op;  // "rms_norm"
  const Machine* machine;
  C10Stream stream;
  std::function<void*(uint64_t bytes)> workspace;  // device memory in stream order
};

// Descriptors of one call's arguments; destroyed after phase 2.
class Descriptors {
 public:
  Descriptors();
  ~Descriptors();
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;

  AclTensor* make(const In& argument) { return tensor(argument.view); }
  AclTensor* make(const Out& argument) { return tensor(argument.view); }
  AclTensor* make(const OptionalIn& argument) {
    return argument.view ? tensor(*argument.view) : nullptr;
  }
  AclTensor* make(const OptionalOut& argument) {
    return argument.view ? tensor(*argument.view) : nullptr;
  }
  AclTensorList* make(const InList& argument) { return list(argument.views); }
  AclTensorList* make(const OutList& argument) { return list(argument.views); }
  AclIntArray* make(const Ints& argument) { return array(argument.values); }
  AclIntArray* make(const OptionalInts& argument) {
    return argument.values.empty() ? nullptr : array(argument.values);
  }
  AclScalar* make(const Scalar& argument) { return scalar(argument.value); }
  const char* make(const Text& argument) { return argument.value; }
  AclType make(const DataType& argument) { return argument.value; }
  template <class T>
  T make(const Number<T>& argument) {
    return argument.value;
  }

 private:
  AclTensor* tensor(const View& view);
  AclTensorList* list(const std::vector<View>& views);  // nullptr for none
  AclIntArray* array(const std::vector<int64_t>& values);
  AclScalar* scalar(float value);

  std::vector<AclTensor*> tensors_;
  std::vector<AclTensorList*> lists_;  // each owns its tensors
  std::vector<AclIntArray*> arrays_;
  std::vector<AclScalar*> scalars_;
};

struct Prepared {
  Resolved function;
  uint64_t workspace = 0;
  AclExecutor* executor = nullptr;
  std::shared_ptr<Descriptors> descriptors;
};

// LaunchError: operator, function, package, chip, CANN, and CANN's code and text.
[[noreturn]] void refuse(const Site& site, const char* symbol, Package package, int code);
void finish(const Site& site, Prepared prepared);

// Prepares and enqueues one call. LaunchError if phase 1 refuses; the queue is untouched then.
template <class Function>
void launch(const Site& site, const Function& function) {
  static const Resolved resolved =
      resolve_or_throw(Function::symbol, Function::versions, *site.machine);
  Prepared prepared{resolved, 0, nullptr, std::make_shared<Descriptors>()};
  const auto raw = std::apply(
      [&](const auto&... argument) { return std::tuple{prepared.descriptors->make(argument)...}; },
      function.arguments());
  const int code = std::apply(
      [&](auto... argument) {
        using Phase1 = int (*)(decltype(argument)..., uint64_t*, AclExecutor**);
        return reinterpret_cast<Phase1>(resolved.phase1)(argument..., &prepared.workspace,
                                                         &prepared.executor);
      },
      raw);
  if (code != 0) {
    refuse(site, Function::symbol, resolved.package, code);
  }
  finish(site, std::move(prepared));
}

}  // namespace dsv4::npu
