// softnpu's own entry points, for the Python API and tests.
#include <cstring>

#include "config.h"
#include "faults.h"
#include "memory.h"
#include "report.h"
#include "stream.h"

using namespace softnpu;

// Length of the JSON text; it is written when it fits into `room` with its closing zero. 0:
// refused.
SOFTNPU_C size_t softnpu_statistics(char* text, size_t room) {
  if (refuse_fork(__func__)) return 0;
  const std::string json = statistics(memory_statistics());
  if (json.size() < room) std::memcpy(text, json.c_str(), json.size() + 1);
  return json.size();
}

// Why SOFTNPU_<name> may not be `value`; "" when it may. Reads no environment and starts nothing.
SOFTNPU_C const char* softnpu_refusal(const char* name, const char* value) {
  static thread_local std::string answer;
  const bool faults = std::strcmp(name, "FAIL") == 0;
  answer = faults ? fault_problem(value) : expected_instead(name, value);
  if (!faults && !answer.empty()) answer = "expected " + answer;
  return answer.c_str();
}

SOFTNPU_C int softnpu_inject(const char* specs) {
  if (const int refused = refuse_fork(__func__)) return refused;
  std::string problem;
  return inject(specs, &problem) ? kOk : fail(kAclParameter, "softnpu: %s", problem.c_str());
}

SOFTNPU_C void softnpu_chaos(uint64_t seed) { set_chaos(seed); }

SOFTNPU_C int softnpu_write_trace(const char* path) {
  const int refused = refuse_fork(__func__);
  return refused ? refused : write_trace(path);
}

SOFTNPU_C int softnpu_check_red_zones() {
  if (const int refused = refuse_fork(__func__)) return refused;
  const std::string problem = check_red_zones();
  return problem.empty() ? kOk : fail(kWriteOutOfBounds, "%s", problem.c_str());
}

// For tests of the guards: writes as a kernel would, without any check of the range.
SOFTNPU_C int softnpu_raw_write(void* device_pointer, size_t offset, unsigned char value) try {
  if (const int refused = refuse_fork(__func__)) return refused;
  const Range range = resolve(device_pointer, 0, -1, __func__);
  static_cast<volatile unsigned char*>(range.alias)[offset] = value;
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}
