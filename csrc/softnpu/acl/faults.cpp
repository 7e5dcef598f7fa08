#include "faults.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <utility>

#include "fork.h"
#include "number.h"

namespace softnpu {
namespace {

constexpr int kUsage = 2;  // exit code of dsv4-ascend for it

struct Planned {
  std::string spec, call;
  uint64_t left;  // uses before the failing one
  int code;
  bool named = false;  // as never fired
};

struct Plan {
  std::mutex mutex;
  std::vector<Planned> waiting;
  std::vector<std::string> fired;
  std::atomic<bool> armed{false};
};

std::string parse(const std::string& spec, Planned* result) {
  const size_t first = spec.find(':'),
               second = spec.find(':', first == std::string::npos ? first : first + 1);
  if (second == std::string::npos || first == 0) return "fault '" + spec + "' is not CALL:N:CODE";
  const std::string call = spec.substr(0, first), n = spec.substr(first + 1, second - first - 1);
  const size_t at = std::min(call.find('@'), call.size());
  if (at < call.size() && call.substr(at) != "@kernel" && call.substr(at) != "@idle")
    return "fault '" + spec + "': '" + call.substr(at) + "' found, '@kernel' or '@idle' expected";
  uint64_t use = 0;
  if (!number(n, &use) || use < 1)
    return "fault '" + spec + "': N is '" + n + "', an integer >= 1 expected";
  int32_t code = 0;
  if (!number(spec.substr(second + 1), &code) || code == 0)
    return "fault '" + spec + "': CODE is '" + spec.substr(second + 1) +
           "', an integer of 32 bits, not 0, expected";
  *result = {spec, call, use - 1, code};
  return "";
}

// acl* functions live in this library, so that a wrong name is known now; operators may be loaded
// later.
void name_unknown(const std::vector<Planned>& planned) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&name_unknown), &self)) return;
  void* const library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return;
  for (const Planned& plan : planned)
    if (plan.call.rfind("acl", 0) == 0 && plan.call.rfind("aclnn", 0) != 0 &&
        !dlsym(library, plan.call.c_str()) && plan.call.find('@') == std::string::npos)
      std::fprintf(stderr, "softnpu: planned fault %s: there is no function %s\n",
                   plan.spec.c_str(), plan.call.c_str());
  dlclose(library);
}

std::string parse_all(const std::string& specs, std::vector<Planned>* result) {
  std::istringstream stream(specs);
  for (std::string spec; std::getline(stream, spec, ',');) {
    Planned planned;
    if (std::string problem = parse(spec, &planned); !problem.empty()) return problem;
    result->push_back(planned);
  }
  return "";
}

Plan& plan() {
  static Plan* const instance = [] {
    auto* result = new Plan;
    if (const char* specs = std::getenv("SOFTNPU_FAIL")) {
      const std::string problem = parse_all(specs, &result->waiting);
      if (!problem.empty()) {
        std::fprintf(stderr, "softnpu: SOFTNPU_FAIL: %s\n", problem.c_str());
        std::_Exit(kUsage);  // no destructors: other threads may be inside the runtime
      }
      name_unknown(result->waiting);
      result->armed = !result->waiting.empty();
    }
    std::atexit(report_unfired);
    return result;
  }();
  return *instance;
}

}  // namespace

bool faults_planned() { return plan().armed.load(std::memory_order_acquire); }

int planned_fault(const std::string& name) {
  if (!faults_planned()) return 0;
  Plan& p = plan();
  std::lock_guard lock(p.mutex);
  int code = 0;
  for (auto fault = p.waiting.begin(); fault != p.waiting.end();) {
    if (fault->call == name && fault->left-- == 0) {
      code = fault->code;
      p.fired.push_back(name);
      fault = p.waiting.erase(fault);
    } else {
      ++fault;
    }
  }
  p.armed = !p.waiting.empty();
  return code;
}

int injected_kernel_fault(const std::string& name) {
  return faults_planned() ? planned_fault(name + "@kernel") : 0;
}

bool injected_idleness(const std::string& name) {
  return faults_planned() && planned_fault(name + "@idle");
}

std::string fault_problem(const std::string& specs) {
  std::vector<Planned> ignored;
  return parse_all(specs, &ignored);
}

bool inject(const std::string& specs, std::string* problem) {
  std::vector<Planned> planned;
  *problem = parse_all(specs, &planned);
  if (!problem->empty()) return false;
  name_unknown(planned);
  Plan& p = plan();
  std::lock_guard lock(p.mutex);
  p.waiting = planned;
  p.fired.clear();
  p.armed = !p.waiting.empty();
  return true;
}

void report_unfired() {
  if (forked()) return;
  Plan& p = plan();
  std::lock_guard lock(p.mutex);
  for (Planned& fault : p.waiting)
    if (!std::exchange(fault.named, true))
      std::fprintf(stderr, "softnpu: planned fault %s never fired\n", fault.spec.c_str());
}

std::vector<std::string> fired_faults() {
  Plan& p = plan();
  std::lock_guard lock(p.mutex);
  return p.fired;
}

std::vector<std::string> waiting_faults() {
  Plan& p = plan();
  std::lock_guard lock(p.mutex);
  std::vector<std::string> specs;
  for (const Planned& fault : p.waiting) specs.push_back(fault.spec);
  return specs;
}

}  // namespace softnpu
