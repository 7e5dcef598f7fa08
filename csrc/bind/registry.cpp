#include "registry.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/boxing/BoxedKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "common/error.h"
#include "words.h"

namespace dsv4::bind {
namespace {

using c10::DispatchKey;
using c10::OperatorHandle;
using torch::jit::Stack;

// Addresses stay valid as candidates are added.
std::deque<Candidate>& table() {
  static std::deque<Candidate> candidates;
  return candidates;
}

thread_local Choice active_choice;

constexpr const char* kNoKernel = "no kernel for this device in this build";

// Without a machine: what CPU kernels ask about costs nothing to make.
const Context& cpu_context() {
  thread_local Context here;
  here.isa = isa();
  return here;
}

// Library objects own their registrations: they live as long as the process.
torch::Library& library(const char* name) {
  static torch::Library dsv4(torch::Library::FRAGMENT, "dsv4", std::nullopt, __FILE__, __LINE__);
  static torch::Library reference(torch::Library::FRAGMENT, "dsv4_reference", std::nullopt,
                                  __FILE__, __LINE__);
  return std::string_view(name) == "dsv4" ? dsv4 : reference;
}

// A defined operator: its rules, its candidates by device, and what to do with a call.
class Operator {
 public:
  Operator(const std::string& name, Specification specification, Relation shapes, Relation contents)
      : specification_(std::move(specification)),
        shapes_(std::move(shapes)),
        contents_(std::move(contents)),
        reference_(c10::Dispatcher::singleton().findSchemaOrThrow(
            ("dsv4_reference::" + name).c_str(), "")),
        arity_(reference_.schema().arguments().size()) {
    for (const auto device : {c10::DeviceType::CPU, c10::DeviceType::PrivateUse1}) {
      candidates_[device] = candidates_of(name, device);
    }
  }

  const std::string& name() const { return specification_.op; }
  size_t arity() const { return arity_; }

  void check(Arguments arguments) const {
    auto sizes = check_arguments(specification_, arguments);
    check_shapes(specification_, arguments, sizes);
    if (shapes_) {
      shapes_(arguments);
    }
    if (on_host(specification_, arguments)) {
      check_memory(specification_, arguments);
      if (active_choice.check_contents) {
        check_host_values(arguments, sizes);
      }
    } else if (active_choice.check_contents && active_choice.check_on_device) {
      check_device_values(arguments, sizes);
    }
  }

  void call(Stack& stack) const {
    check(torch::jit::last(stack, arity_));
    run(stack);
  }

  // Runs the first candidate that agrees, else the reference, on arguments that were checked.
  void run(Stack& stack) const {
    const Arguments arguments = torch::jit::last(stack, arity_);
    const auto device = device_of(arguments);
    if (active_choice.policy != Policy::reference) {
      std::string reason;
      if (const Candidate* chosen = choose(device, arguments, reason)) {
        run_candidate(*chosen, stack);
        return;
      }
      fall_back(device, reason);
    }
    run_reference(device, stack);
  }

  void run_reference(c10::DeviceType device, Stack& stack) const {
    count(device);
    reference_.callBoxed(&stack);
  }

  // Lets the reference run where no candidate does: an error under policy strict, announced on an
  // NPU.
  void fall_back(c10::DeviceType device, const std::string& reason) const {
    if (active_choice.policy == Policy::strict) {
      throw UnsupportedError(
          "dsv4::" + name() + " has no native implementation for these arguments on " +
          c10::DeviceTypeName(device, true) + ": " + reason +
          ". Use dispatch.use(\"auto\") to run the reference on the same device.");
    }
    if (device != c10::DeviceType::CPU && device != c10::DeviceType::Meta) {
      announce(device, reason);
    }
  }

  c10::DeviceType device_of(Arguments arguments) const {
    for (const auto& value : arguments) {
      if (value.isTensor() && value.toTensor().defined()) {
        return value.toTensor().device().type();
      }
    }
    return c10::DeviceType::CPU;
  }

  // In reverse mode or, by a tangent, in forward mode.
  bool needs_gradient(Arguments arguments) const {
    const bool reverse = c10::GradMode::is_enabled();
    const bool forward = c10::AutogradState::get_tls_state().get_fw_grad_mode();
    return std::any_of(arguments.begin(), arguments.end(), [&](const c10::IValue& value) {
      return value.isTensor() && ((reverse && value.toTensor().requires_grad()) ||
                                  (forward && value.toTensor()._fw_grad(0).defined()));
    });
  }

  void collect(std::vector<Ran>& rows) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [device, times] : reference_runs_) {
      rows.push_back({name(), device, "reference", times});
    }
  }

  void forget() const {
    const std::lock_guard lock(mutex_);
    reference_runs_.clear();
  }

 private:
  const Candidate* choose(c10::DeviceType device, Arguments arguments, std::string& reason) const {
    const auto found = candidates_.find(device);
    if (found == candidates_.end() || found->second.empty()) {
      reason = kNoKernel;
      return nullptr;
    }
    const Context& here = device == c10::DeviceType::CPU ? cpu_context() : npu_context();
    for (const Candidate* candidate : found->second) {
      if (!active_choice.only.empty() && candidate->name != active_choice.only) {
        continue;
      }
      const WhyNot why_not = candidate->why_not(here, arguments);
      if (!why_not) {
        return candidate;
      }
      reason = *why_not;  // the last candidate asks for least: its reason is the one that counts
    }
    if (reason.empty()) {
      reason = "no implementation is named " + active_choice.only;
    }
    return nullptr;
  }

  void run_candidate(const Candidate& candidate, Stack& stack) const {
    candidate.runs.fetch_add(1, std::memory_order_relaxed);
    c10::SmallVector<at::Tensor, 2> written;
    for (const TensorRule& rule : specification_.tensors) {
      if (rule.written) {
        written.push_back(torch::jit::last(stack, arity_)[rule.position].toTensor());
      }
    }
    candidate.run(stack);
    // The version counter tells autograd that a kernel wrote through a raw pointer.
    for (const at::Tensor& tensor : written) {
      if (!tensor.is_inference()) {
        tensor.unsafeGetTensorImpl()->bump_version();
      }
    }
  }

  void check_host_values(Arguments arguments, Sizes& sizes) const {
    check_values(specification_, arguments, sizes);
    check_contents(specification_, arguments, sizes);
    if (contents_) {
      contents_(arguments);
    }
  }

  // Smallest and largest value of every ranged argument, computed on the device and fetched at
  // once.
  void check_device_values(Arguments arguments, const Sizes& sizes) const {
    std::vector<const TensorRule*> rules;
    std::vector<at::Tensor> extremes;
    for (const TensorRule& rule : specification_.tensors) {
      const c10::IValue& value = arguments[rule.position];
      if (rule.low && value.isTensor() && value.toTensor().numel() > 0) {
        const auto [smallest, largest] = at::aminmax(value.toTensor());
        extremes.push_back(smallest.to(at::kLong));
        extremes.push_back(largest.to(at::kLong));
        rules.push_back(&rule);
      }
    }
    if (rules.empty()) {
      return;
    }
    const at::Tensor fetched = at::stack(extremes).cpu();
    const int64_t* value = fetched.const_data_ptr<int64_t>();
    for (size_t i = 0; i < rules.size(); ++i) {
      const int64_t low = rules[i]->low->value(sizes).value();
      const int64_t high = rules[i]->high ? rules[i]->high->value(sizes).value() : INT64_MAX;
      if (value[2 * i] < low || value[2 * i + 1] >= high) {
        throw ArgumentError(name(), rules[i]->name,
                            c10::str("values from ", value[2 * i], " to ", value[2 * i + 1]),
                            c10::str("values in [", low, ", ", high, ")"));
      }
    }
  }

  // Once per operator; once for all of them that have no kernel for this device.
  void announce(c10::DeviceType device, const std::string& reason) const {
    static std::mutex mutex;
    static std::set<std::string> announced;
    const auto found = candidates_.find(device);
    const bool any = found != candidates_.end() && !found->second.empty();
    const std::string what =
        any ? "dsv4::" + name() : "dsv4::" + name() + ", as every operator without a kernel,";
    const std::lock_guard lock(mutex);
    if (announced.insert(any ? name() : "").second) {
      TORCH_WARN(what, " runs as its PyTorch reference on ", c10::DeviceTypeName(device, true),
                 ": ", reason,
                 ". `dsv4-ascend ops` lists every operator; dispatch.use(\"strict\") makes this an "
                 "error.");
    }
  }

  void count(c10::DeviceType device) const {
    const std::lock_guard lock(mutex_);
    ++reference_runs_[device];
  }

  Specification specification_;
  Relation shapes_;
  Relation contents_;
  OperatorHandle reference_;
  size_t arity_;
  std::map<c10::DeviceType, std::vector<const Candidate*>> candidates_;
  mutable std::mutex mutex_;
  mutable std::map<c10::DeviceType, uint64_t> reference_runs_;
};

std::map<std::string, std::shared_ptr<Operator>>& operators() {
  static std::map<std::string, std::shared_ptr<Operator>> defined;
  return defined;
}

struct Run final : c10::OperatorKernel {
  explicit Run(std::shared_ptr<Operator> of) : op(std::move(of)) {}

  void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) const {
    op->call(*stack);
  }

  std::shared_ptr<Operator> op;
};

// The gradient of an operator is the gradient of its reference.
struct RunAutograd final : c10::OperatorKernel {
  explicit RunAutograd(std::shared_ptr<Operator> of) : op(std::move(of)) {}

  void operator()(const OperatorHandle& handle, c10::DispatchKeySet keys, Stack* stack) const {
    const Arguments arguments = torch::jit::last(*stack, op->arity());
    if (op->needs_gradient(arguments)) {
      op->check(arguments);
      const auto device = op->device_of(arguments);
      if (active_choice.policy != Policy::reference) {
        op->fall_back(device,
                      "a gradient is needed, and it is the reference that is differentiated");
      }
      op->run_reference(device, *stack);
      return;
    }
    const at::AutoDispatchBelowAutograd guard;
    if (is_backend((keys & c10::after_ADInplaceOrView_keyset).highestPriorityTypeId())) {
      // Nothing lies in between: no second dispatch.
      op->call(*stack);
    } else {
      handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
  }

  static bool is_backend(DispatchKey key) {
    return key == DispatchKey::CPU || key == DispatchKey::PrivateUse1;
  }

  std::shared_ptr<Operator> op;
};

template <class Kernel>
torch::CppFunction boxed(const std::shared_ptr<Operator>& op) {
  return torch::CppFunction::makeFromBoxedKernel(
      c10::BoxedKernel::makeFromFunctor(std::make_unique<Kernel>(op)));
}

}  // namespace

void add_candidate(std::string op, c10::DeviceType device, std::string name,
                   std::function<WhyNot(const Context&, Arguments)> why_not,
                   std::function<void(torch::jit::Stack&)> run, Parts parts) {
  table().emplace_back(std::move(op), device, std::move(name), std::move(why_not), std::move(run),
                       std::move(parts));
}

std::vector<const Candidate*> candidates_of(const std::string& op, c10::DeviceType device) {
  std::vector<const Candidate*> found;
  for (const Candidate& candidate : table()) {
    if (candidate.op == op && candidate.device == device) {
      found.push_back(&candidate);
    }
  }
  return found;
}

std::vector<const Candidate*> all_candidates() {
  std::vector<const Candidate*> found;
  for (const Candidate& candidate : table()) {
    found.push_back(&candidate);
  }
  return found;
}

Context context() { return {isa(), npu::machine_here()}; }

const Context& npu_context() {
  static const Context here = context();
  return here;
}

const Choice& choice() { return active_choice; }
void set_choice(Choice value) { active_choice = std::move(value); }

void define(const std::string& schema, Specification specification, Relation shapes,
            Relation contents) {
  const auto name = schema.substr(0, schema.find('('));
  library("dsv4_reference").def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  library("dsv4").def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  const auto op = std::make_shared<Operator>(name, std::move(specification), std::move(shapes),
                                             std::move(contents));
  operators()[name] = op;
  library("dsv4").impl(name.c_str(),
                       torch::dispatch(DispatchKey::CompositeExplicitAutograd, boxed<Run>(op)));
  library("dsv4").impl(name.c_str(),
                       torch::dispatch(DispatchKey::Autograd, boxed<RunAutograd>(op)));
}

void check_call(const std::string& op, Arguments arguments) {
  operators().at(op)->check(arguments);
}

std::vector<Ran> ran() {
  std::vector<Ran> rows;
  for (const Candidate& candidate : table()) {
    if (const auto times = candidate.runs.load(std::memory_order_relaxed)) {
      rows.push_back({candidate.op, candidate.device, candidate.name, times});
    }
  }
  for (const auto& [name, op] : operators()) {
    op->collect(rows);
  }
  return rows;
}

void forget_ran() {
  for (const Candidate& candidate : table()) {
    candidate.runs.store(0, std::memory_order_relaxed);
  }
  for (const auto& [name, op] : operators()) {
    op->forget();
  }
}

}  // namespace dsv4::bind
