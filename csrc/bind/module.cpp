// The Python face of the extension: operator definition, policy and support queries.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "common/error.h"
#include "common/isa.h"
#include "registry.h"

namespace py = pybind11;
using dsv4::bind::Kernel;
using dsv4::bind::Policy;

namespace {

std::vector<std::tuple<std::string, std::string, std::string>> list_kernels() {
  std::vector<std::tuple<std::string, std::string, std::string>> rows;
  for (const Kernel& kernel : dsv4::bind::kernels()) {
    rows.emplace_back(kernel.op, c10::DeviceTypeName(kernel.device, true), kernel.name);
  }
  return rows;
}

// Asks the predicate that also guards the call. None means the kernel runs these arguments.
dsv4::bind::WhyNot why_not(const std::string& op, const std::string& device, const py::args& args,
                           const py::kwargs& kwargs) {
  const Kernel* kernel = dsv4::bind::find_kernel(op, c10::Device(device).type());
  if (kernel == nullptr) {
    return "no kernel for this device in this build";
  }
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("dsv4::" + op).c_str(), "");
  const auto stack = torch::jit::createStackForSchema(handle.schema(), args, kwargs, std::nullopt);
  return kernel->why_not(stack);
}

std::vector<std::string> list_isas() {
  std::vector<std::string> names;
  for (const dsv4::Isa value : dsv4::available_isas()) {
    names.emplace_back(dsv4::isa_name(value));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception_translator([](std::exception_ptr error) {
    const auto raise = [](const char* type, const char* message) {
      py::set_error(py::module_::import("dsv4_backend.errors").attr(type), message);
    };
    try {
      if (error) {
        std::rethrow_exception(error);
      }
    } catch (const dsv4::ArgumentError& e) {
      raise("ArgumentError", e.what());
    } catch (const dsv4::UnsupportedError& e) {
      raise("UnsupportedError", e.what());
    }
  });

  py::enum_<Policy>(m, "Policy")
      .value("auto", Policy::automatic)
      .value("reference", Policy::reference)
      .value("strict", Policy::strict);
  m.def("policy", &dsv4::bind::policy);
  m.def("set_policy", &dsv4::bind::set_policy);
  m.def("define", &dsv4::bind::define);
  m.def("kernels", &list_kernels);
  m.def("why_not", &why_not);
  m.def("available_isas", &list_isas);
  m.def("isa", [] { return dsv4::isa_name(dsv4::isa()); });
  m.def("set_isa", [](const std::string& name) { dsv4::set_isa(dsv4::parse_isa(name)); });
}
