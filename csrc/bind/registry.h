// Which implementation of an operator runs where: ordered candidates per device behind
// torch.ops.dsv4.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceType.h>

#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "npu/machine.h"
#include "specification.h"

namespace dsv4::bind {

// Says why these arguments cannot run, or nothing when they can.
using WhyNot = std::optional<std::string>;

// What a predicate may know beside the arguments. A made-up one answers for a machine that is not
// here.
struct Context {
  Isa isa = Isa::portable;
  npu::Machine machine;
};

// What an implementation is made of: a kernel of this project, or one function of the device's,
// copies aside, or several.
enum class Kind { kernel, fused, composite };
struct Parts {
  Kind kind = Kind::kernel;
  std::vector<std::string> symbols = {};  // functions that its launcher names
};

// One implementation for one device type. The first whose predicate agrees runs.
struct Candidate {
  std::string op;
  c10::DeviceType device;
  std::string name;  // for example "rms_norm/avx512"
  std::function<WhyNot(const Context&, Arguments)> why_not;
  std::function<void(torch::jit::Stack&)>
      run;  // takes the arguments off the stack and leaves the results
  Parts parts;
  mutable std::atomic<uint64_t> runs{0};

  Candidate(std::string op, c10::DeviceType device, std::string name,
            std::function<WhyNot(const Context&, Arguments)> why_not,
            std::function<void(torch::jit::Stack&)> run, Parts parts)
      : op(std::move(op)),
        device(device),
        name(std::move(name)),
        why_not(std::move(why_not)),
        run(std::move(run)),
        parts(std::move(parts)) {}
};

// Candidates register themselves while the extension loads, best first, before any operator is
// defined.
void add_candidate(std::string op, c10::DeviceType device, std::string name,
                   std::function<WhyNot(const Context&, Arguments)> why_not,
                   std::function<void(torch::jit::Stack&)> run, Parts parts = {});
std::vector<const Candidate*> candidates_of(const std::string& op, c10::DeviceType device);
std::vector<const Candidate*> all_candidates();

Context context();             // of this process, as it is now
const Context& npu_context();  // the same where an NPU's tensor exists: looked up once

enum class Policy { automatic, reference, strict };
struct Choice {
  Policy policy = Policy::automatic;
  std::string only;  // no other candidate than this one; empty: any
  bool check_on_device =
      false;  // read values (ids, block tables) of device tensors too: one synchronisation a call
  bool check_contents = true;  // false: read no values, of host tensors neither
};
const Choice& choice();
void set_choice(Choice value);  // of the calling thread

// Checks that a contract keeps in Python because neither its lines nor its relations can say them.
using Relation = std::function<void(Arguments)>;

// Defines dsv4::<schema> and dsv4_reference::<schema> and routes the first to a candidate or to the
// second.
void define(const std::string& schema, Specification specification, Relation shapes,
            Relation contents);

// Everything that is checked before a call of a defined operator, for fake tensors and for queries.
void check_call(const std::string& op, Arguments arguments);

// (operator, device, implementation) -> how often it ran in this process.
struct Ran {
  std::string op;
  c10::DeviceType device;
  std::string implementation;
  uint64_t times;
};
std::vector<Ran> ran();
void forget_ran();

}  // namespace dsv4::bind
