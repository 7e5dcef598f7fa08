// The Python face of the extension: operator definition, policy, support queries and counts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "common/error.h"
#include "common/isa.h"
#include "npu/function.h"
#include "registry.h"
#include "step.h"

namespace py = pybind11;
using dsv4::bind::Arguments;
using dsv4::bind::Candidate;
using dsv4::bind::Choice;
using dsv4::bind::Context;
using dsv4::bind::Fact;
using dsv4::bind::Piece;
using dsv4::bind::Policy;
using dsv4::bind::Relation;
using dsv4::bind::RelationRule;
using dsv4::bind::ScalarRule;
using dsv4::bind::Specification;
using dsv4::bind::Step;
using dsv4::bind::TensorRule;
using dsv4::bind::Term;
using dsv4::bind::Words;

namespace {

Term make_term(const std::string& text,
               const std::vector<std::pair<std::string, int64_t>>& program) {
  std::vector<Term::Step> steps;
  for (const auto& [operation, value] : program) {
    steps.push_back({operation.at(0), value});
  }
  return {text, std::move(steps)};
}

// A Python check as a function of the boxed arguments. Operators live as long as the process, so it
// is never freed.
Relation make_relation(const py::object& check) {
  if (check.is_none()) {
    return nullptr;
  }
  return [function = py::object(check).release()](Arguments arguments) {
    const py::gil_scoped_acquire gil;
    py::tuple values(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      values[i] = torch::jit::toPyObject(arguments[i]);
    }
    function(*values);
  };
}

torch::jit::Stack stack_of(const std::string& op, const py::args& args, const py::kwargs& kwargs) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("dsv4::" + op).c_str(), "");
  return torch::jit::createStackForSchema(handle.schema(), args, kwargs, std::nullopt);
}

void check_call(const std::string& op, const py::args& args) {
  const auto stack = stack_of(op, args, {});
  dsv4::bind::check_call(op, stack);
}

// "npu" is torch's private device type, also where torch_npu has not named it.
c10::DeviceType device_type(const std::string& name) {
  return name == "npu" ? c10::DeviceType::PrivateUse1 : c10::Device(name).type();
}

std::string device_name(c10::DeviceType type) {
  return type == c10::DeviceType::PrivateUse1 ? "npu" : c10::DeviceTypeName(type, true);
}

using Answers = std::vector<std::pair<std::string, std::optional<std::string>>>;

// What every candidate's predicate says of a call: (name, reason against or None), best first.
Answers candidates(const std::string& op, const std::string& device,
                   const std::optional<Context>& context, const py::args& args,
                   const py::kwargs& kwargs) {
  const auto stack = stack_of(op, args, kwargs);
  Answers answers;
  for (const Candidate* candidate : dsv4::bind::candidates_of(op, device_type(device))) {
    answers.emplace_back(candidate->name,
                         candidate->why_not(context.value_or(dsv4::bind::context()), stack));
  }
  return answers;
}

// (operator, device, name, kind, symbols of the functions that it launches by name)
using CandidateRow =
    std::tuple<std::string, std::string, std::string, std::string, std::vector<std::string>>;

std::vector<CandidateRow> list_candidates() {
  constexpr std::array kinds = {"kernel", "fused", "composite"};
  std::vector<CandidateRow> rows;
  for (const Candidate* candidate : dsv4::bind::all_candidates()) {
    const auto& [kind, symbols] = candidate->parts;
    rows.emplace_back(candidate->op, device_name(candidate->device), candidate->name,
                      kinds.at(static_cast<size_t>(kind)), symbols);
  }
  return rows;
}

std::vector<std::tuple<std::string, std::string, std::string, uint64_t>> list_ran() {
  std::vector<std::tuple<std::string, std::string, std::string, uint64_t>> rows;
  for (const auto& row : dsv4::bind::ran()) {
    rows.emplace_back(row.op, device_name(row.device), row.implementation, row.times);
  }
  return rows;
}

// (symbol, C signature of phase 1 without its last two arguments, where documents place it, package
// in which they do here or nothing, package that has it here or nothing)
std::vector<std::array<std::string, 5>> list_npu_functions() {
  const auto machine = dsv4::npu::machine_here();
  std::vector<std::array<std::string, 5>> rows;
  for (const auto& one : dsv4::npu::listed()) {
    const auto found = dsv4::npu::resolve(one.symbol, one.versions, machine);
    rows.push_back({one.symbol, one.signature(), dsv4::npu::documented(one.versions),
                    dsv4::npu::expected(one.versions, machine),
                    found.phase1 ? dsv4::npu::package_name(found.package) : ""});
  }
  return rows;
}

std::vector<std::string> list_npu_packages() {
  std::vector<std::string> names;
  for (const auto package : dsv4::npu::machine_here().packages) {
    names.emplace_back(dsv4::npu::package_name(package));
  }
  return names;
}

// Any instruction set that the code knows: predicates are asked about machines that are not here,
// too.
dsv4::Isa known_isa(const std::string& name) {
  for (const dsv4::Isa value : {dsv4::Isa::portable, dsv4::Isa::avx2, dsv4::Isa::avx512}) {
    if (name == dsv4::isa_name(value)) {
      return value;
    }
  }
  throw std::invalid_argument("ISA '" + name + "' is not portable, avx2 or avx512");
}

std::vector<std::string> list_isas() {
  std::vector<std::string> names;
  for (const dsv4::Isa value : dsv4::available_isas()) {
    names.emplace_back(dsv4::isa_name(value));
  }
  return names;
}

void bind_rules(py::module_& m) {
  py::class_<Term>(m, "Term").def(py::init(&make_term));
  py::class_<TensorRule>(m, "TensorRule")
      .def(py::init<std::string, std::string, size_t, bool, bool, std::vector<c10::ScalarType>,
                    int64_t, std::string, std::vector<Term>, bool, std::optional<Term>,
                    std::optional<Term>>());
  py::class_<ScalarRule>(m, "ScalarRule")
      .def(py::init<std::string, size_t, std::string, std::optional<Term>, bool,
                    std::optional<Term>, bool, bool>());
  py::class_<Piece>(m, "Piece").def(py::init<std::string, char, size_t, std::optional<Term>>());
  py::class_<Fact>(m, "Fact").def(py::init<size_t, char, size_t, size_t>());
  py::class_<RelationRule>(m, "RelationRule")
      .def(py::init<std::string, std::vector<std::string>, std::vector<size_t>, std::vector<Term>,
                    Words, Words>());
  m.def("define",
        [](const std::string& schema, size_t names, std::vector<std::pair<size_t, size_t>> integers,
           std::vector<TensorRule> tensors, std::vector<ScalarRule> scalars, size_t new_tokens,
           std::vector<Fact> facts, std::vector<RelationRule> relations, const py::object& shapes,
           const py::object& contents) {
          Specification specification{schema.substr(0, schema.find('(')),
                                      names,
                                      std::move(integers),
                                      std::move(tensors),
                                      std::move(scalars),
                                      new_tokens,
                                      std::move(facts),
                                      std::move(relations)};
          dsv4::bind::define(schema, std::move(specification), make_relation(shapes),
                             make_relation(contents));
        });
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
    } catch (const dsv4::LaunchError& e) {
      raise("LaunchError", e.what());
    }
  });

  py::enum_<Policy>(m, "Policy")
      .value("auto", Policy::automatic)
      .value("reference", Policy::reference)
      .value("strict", Policy::strict);
  py::class_<Choice>(m, "Choice")
      .def(py::init<Policy, std::string, bool, bool>())
      .def_readonly("policy", &Choice::policy)
      .def_readonly("only", &Choice::only)
      .def_readonly("check_on_device", &Choice::check_on_device)
      .def_readonly("check_contents", &Choice::check_contents);
  py::class_<Context>(m, "Context")
      .def(py::init([](const std::string& isa, std::string chip, std::string cann,
                       const std::vector<std::string>& packages) {
        dsv4::npu::Machine machine{std::move(chip), std::move(cann), {}};
        for (const std::string& name : packages) {
          machine.packages.push_back(dsv4::npu::package_named(name));
        }
        return Context{known_isa(isa), std::move(machine)};
      }));
  py::class_<Step>(m, "Step")
      .def(py::init<>())
      .def("give", [](Step& step, std::string name, std::vector<at::Tensor> of,
                      std::vector<int64_t> numbers, std::vector<at::Tensor> values) {
        step.give({std::move(name), std::move(of), std::move(numbers)}, std::move(values));
      });
  m.def("open_step", &Step::open, py::return_value_policy::reference);
  m.def("choice", [] { return dsv4::bind::choice(); });
  m.def("set_choice", &dsv4::bind::set_choice);
  bind_rules(m);
  m.def("check", &check_call);
  m.def("candidates", &list_candidates);
  m.def("answers", &candidates);
  m.def("npu_functions", &list_npu_functions);
  m.def("npu_packages", &list_npu_packages);
  m.def("ran", &list_ran);
  m.def("forget_ran", &dsv4::bind::forget_ran);
  m.def("available_isas", &list_isas);
  m.def("isa", [] { return dsv4::isa_name(dsv4::isa()); });
  m.def("set_isa", [](const std::string& name) { dsv4::set_isa(dsv4::parse_isa(name)); });
}
