// Which implementation of an operator runs where: the table behind torch.ops.dsv4.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dsv4::bind {

// Says why these arguments cannot run on this kernel, or nothing when they can.
using WhyNot = std::optional<std::string>;

struct Kernel {
  std::string op;
  c10::DeviceType device;
  std::string name;  // what `dsv4-ascend ops` prints, for example "rms_norm/avx512"
  c10::KernelFunction run;
  WhyNot (*why_not)(const torch::jit::Stack& arguments);
};

// Kernels register themselves while the extension loads, before any operator can run.
void add_kernel(Kernel kernel);
const Kernel* find_kernel(const std::string& op, c10::DeviceType device);
const std::vector<Kernel>& kernels();

enum class Policy { automatic, reference, strict };
Policy policy();
void set_policy(Policy value);  // of the calling thread

// Defines dsv4::<schema> and dsv4_reference::<schema> and routes the first to a kernel or to the second.
void define(const std::string& schema);

template <auto function, auto predicate>
struct Registration {
  Registration(std::string op, c10::DeviceType device, std::string name) {
    add_kernel({std::move(op), device, std::move(name), c10::KernelFunction::makeFromUnboxedRuntimeFunction(function),
                predicate});
  }
};

}  // namespace dsv4::bind
