// Launches of one operator call: torch's tensors as descriptors, its current stream, workspace from
// its allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "candidate.h"
#include "npu/launch.h"

namespace dsv4::bind {

// Lives for one call, and with it what its launches refer to.
class NpuCall {
 public:
  NpuCall(const char* op, const at::Tensor& on);

  // The tensors must outlive the call of `launch`.
  npu::In in(const at::Tensor& tensor) const { return {view(tensor)}; }
  npu::Out out(const at::Tensor& tensor) const { return {view(tensor)}; }

  // Absent for a null pointer.
  npu::OptionalIn maybe(const at::Tensor* tensor) const {
    return tensor == nullptr ? npu::OptionalIn() : npu::OptionalIn{view(*tensor)};
  }

  template <class... Ts>
  npu::InList list(const Ts&... tensors) const {
    return {{view(tensors)...}};
  }
  template <class... Ts>
  npu::OutList out_list(const Ts&... tensors) const {
    return {{view(tensors)...}};
  }

  template <class Function>
  void launch(const Function& function) const {
    npu::launch(site_, function);
  }

 private:
  static npu::View view(const at::Tensor& tensor);

  c10::DeviceGuard guard_;
  c10::Stream stream_;
  std::vector<at::Tensor> workspaces_;
  npu::Site site_;
};

npu::AclType acl_type(at::ScalarType type);

bool on_a5(const Context& context);

// Why a machine has no such function; for predicates.
template <class Function>
WhyNot not_available(const Context& context) {
  const auto ask = [](const npu::Machine& machine) {
    const std::string reason = npu::missing(Function::symbol, Function::versions, machine);
    return reason.empty() ? WhyNot() : WhyNot(reason);
  };
  if (&context != &npu_context()) {
    return ask(context.machine);
  }
  static const WhyNot here =
      ask(npu_context().machine);  // looking a symbol up costs more than a launch
  return here;
}

constexpr std::initializer_list<at::ScalarType> kHalves = {at::kBFloat16, at::kHalf};
constexpr std::initializer_list<at::ScalarType> kFloats = {at::kBFloat16, at::kHalf, at::kFloat};

// Why a tensor is none of these dtypes.
WhyNot not_of(const char* name, const at::Tensor& tensor,
              std::initializer_list<at::ScalarType> types);

// What no aclnn function of this project takes.
inline WhyNot empty(const char* name, const at::Tensor& tensor) {
  return tensor.numel() > 0 ? WhyNot() : WhyNot(std::string(name) + " is empty");
}

inline WhyNot unless(bool holds, const char* reason) { return holds ? WhyNot() : WhyNot(reason); }

// Every function that some launcher calls stands once in the table of functions.
template <class Function>
inline const npu::List<Function> kListed;

// A launcher. `Kernel` has `run` and `why_not(const Context&, ...)` with the operator's own
// parameters; its functions are asked for before `why_not`, and the first names the candidate. One
// whose `run` also computes with torch says that it is a composite.
template <class Kernel, class Function, class... More>
struct NpuRegistration {
  static constexpr Kind kByFunctions = sizeof...(More) == 0 ? Kind::fused : Kind::composite;

  explicit NpuRegistration(const std::string& op, Kind kind = kByFunctions) {
    static_cast<void>(&kListed<Function>);
    (static_cast<void>(&kListed<More>), ...);
    add_candidate(op, c10::DeviceType::PrivateUse1, op + "/" + Function::symbol, &why_not,
                  &TypedFunction<Kernel::run>::run, {kind, {Function::symbol, More::symbol...}});
  }

 private:
  static WhyNot why_not(const Context& context, Arguments arguments) {
    const WhyNot missing = first(not_available<Function>(context), not_available<More>(context)...);
    return missing ? missing : TypedPredicate<Kernel::why_not>::why_not(context, arguments);
  }
};

}  // namespace dsv4::bind
