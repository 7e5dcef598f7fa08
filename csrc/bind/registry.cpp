#include "registry.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <unordered_set>

#include "common/error.h"

namespace dsv4::bind {
namespace {

using c10::DispatchKey;
using c10::OperatorHandle;
using torch::jit::Stack;

std::vector<Kernel>& table() {
  static std::vector<Kernel> kernels;
  return kernels;
}

thread_local Policy active_policy = Policy::automatic;

// Library objects own their registrations: they live as long as the process.
torch::Library& library(const char* name) {
  static torch::Library dsv4(torch::Library::FRAGMENT, "dsv4", std::nullopt, __FILE__, __LINE__);
  static torch::Library reference(torch::Library::FRAGMENT, "dsv4_reference", std::nullopt, __FILE__, __LINE__);
  return std::string_view(name) == "dsv4" ? dsv4 : reference;
}

std::string short_name(const OperatorHandle& op) {
  return op.operator_name().name.substr(std::string_view("dsv4::").size());
}

OperatorHandle reference_of(const std::string& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("dsv4_reference::" + op).c_str(), "");
}

// torch passes None for a tensor as an undefined one, which kernels and predicates must never see.
void require_tensors(const OperatorHandle& op, const Stack& stack) {
  const auto values = torch::jit::last(stack, op.schema().arguments().size());
  for (size_t i = 0; i < values.size(); ++i) {
    const auto& argument = op.schema().arguments()[i];
    if (argument.type()->kind() == c10::TypeKind::TensorType && !values[i].toTensor().defined()) {
      throw ArgumentError(short_name(op), argument.name(), "None", "a tensor");
    }
  }
}

c10::DeviceType device_of(const OperatorHandle& op, const Stack& stack) {
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor() && value.toTensor().defined()) {
      return value.toTensor().device().type();
    }
  }
  return c10::DeviceType::CPU;
}

// Once per operator; once for all of them on a device for which this build has no kernel.
void announce_reference(const std::string& op, c10::DeviceType device, const std::string& reason) {
  static std::mutex mutex;
  static std::unordered_set<std::string> announced;
  const bool any = std::any_of(table().begin(), table().end(), [&](const Kernel& k) { return k.device == device; });
  const std::string what = any ? "dsv4::" + op : "every operator of dsv4";
  const std::lock_guard lock(mutex);
  if (announced.insert(what).second) {
    TORCH_WARN(what, " runs as its PyTorch reference on ", c10::DeviceTypeName(device, true), ": ",
               any ? reason : "no kernel for this device in this build",
               ". `dsv4-ascend ops` lists every operator; dispatch.use(\"strict\") makes this an error.");
  }
}

// Lets the reference run where no native kernel does: an error under policy strict, announced on an NPU.
void fall_back(const std::string& op, c10::DeviceType device, const std::string& reason) {
  if (active_policy == Policy::strict) {
    throw UnsupportedError("dsv4::" + op + " has no native implementation for these arguments on " +
                           c10::DeviceTypeName(device, true) + ": " + reason +
                           ". Use dispatch.use(\"auto\") to run the reference on the same device.");
  }
  if (device != c10::DeviceType::CPU && device != c10::DeviceType::Meta) {
    announce_reference(op, device, reason);
  }
}

// The version counter tells autograd that a kernel wrote through a raw pointer.
void bump_mutated_arguments(const OperatorHandle& op, const Stack& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite() && arguments[i].isTensor() && !arguments[i].toTensor().is_inference()) {
      arguments[i].toTensor().unsafeGetTensorImpl()->bump_version();
    }
  }
}

void run(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  require_tensors(op, *stack);
  const auto name = short_name(op);
  const auto device = device_of(op, *stack);
  if (active_policy != Policy::reference) {
    const auto values = torch::jit::last(*stack, op.schema().arguments().size());
    const Stack arguments(values.begin(), values.end());
    const Kernel* kernel = find_kernel(name, device);
    const WhyNot why_not = kernel != nullptr ? kernel->why_not(arguments) : "no kernel for this device in this build";
    if (!why_not) {
      kernel->run.callBoxed(op, keys, stack);
      bump_mutated_arguments(op, arguments);
      return;
    }
    fall_back(name, device, *why_not);
  }
  reference_of(name).callBoxed(stack);
}

bool needs_gradient(const OperatorHandle& op, const Stack& stack) {
  if (!c10::GradMode::is_enabled()) {
    return false;
  }
  const auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& value) {
    if (value.isTensorList()) {
      const auto list = value.toTensorVector();
      return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return t.requires_grad(); });
    }
    return value.isTensor() && value.toTensor().requires_grad();
  });
}

// The gradient of an operator is the gradient of its reference.
void run_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (needs_gradient(op, *stack)) {
    const auto name = short_name(op);
    if (active_policy != Policy::reference) {
      fall_back(name, device_of(op, *stack), "a gradient is needed, and it is the reference that is differentiated");
    }
    reference_of(name).callBoxed(stack);
    return;
  }
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

void add_kernel(Kernel kernel) { table().push_back(std::move(kernel)); }

const std::vector<Kernel>& kernels() { return table(); }

const Kernel* find_kernel(const std::string& op, c10::DeviceType device) {
  const auto found =
      std::find_if(table().begin(), table().end(), [&](const Kernel& k) { return k.op == op && k.device == device; });
  return found == table().end() ? nullptr : &*found;
}

Policy policy() { return active_policy; }
void set_policy(Policy value) { active_policy = value; }

void define(const std::string& schema) {
  const auto name = schema.substr(0, schema.find('('));
  library("dsv4_reference").def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  library("dsv4").def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  library("dsv4").impl(name.c_str(), torch::dispatch(DispatchKey::CompositeExplicitAutograd,
                                                     torch::CppFunction::makeFromBoxedFunction<&run>()));
  library("dsv4").impl(
      name.c_str(), torch::dispatch(DispatchKey::Autograd, torch::CppFunction::makeFromBoxedFunction<&run_autograd>()));
}

}  // namespace dsv4::bind
