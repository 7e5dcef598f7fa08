// Launches of one operator call: torch's tensors as descriptors, its current stream, workspace from
// its allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>

#include <optional>
#include <string>
#include <vector>

#include "npu/launch.h"
#include "registry.h"

namespace dsv4::bind {

// Lives for one call, and with it what its launches refer to.
class NpuCall {
 public:
  NpuCall(const char* op, const at::Tensor& on);

  // The tensors must outlive the call of `launch`.
  npu::In in(const at::Tensor& tensor) const { return {view(tensor)}; }
  npu::Out out(const at::Tensor& tensor) const { return {view(tensor)}; }

  template <class Function>
  void launch(const Function& function) {
    npu::launch(site_, function);
  }

 private:
  static npu::View view(const at::Tensor& tensor);

  c10::DeviceGuard guard_;
  c10::Stream stream_;
  std::vector<at::Tensor> workspaces_;
  npu::Site site_;
};

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

// The first reason there is.
template <class... More>
WhyNot first(WhyNot reason, More... more) {
  if constexpr (sizeof...(more) == 0) {
    return reason;
  } else {
    return reason ? reason : first(more...);
  }
}

// Why a tensor is none of these dtypes.
WhyNot not_of(const char* name, const at::Tensor& tensor,
              std::initializer_list<at::ScalarType> types);

inline WhyNot unless(bool holds, const char* reason) { return holds ? WhyNot() : WhyNot(reason); }

}  // namespace dsv4::bind
