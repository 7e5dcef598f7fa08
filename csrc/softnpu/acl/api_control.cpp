// softnpu's own entry points, for the Python API and tests.
#include <cstring>

#include "memory.h"
#include "report.h"
#include "stream.h"

using namespace softnpu;

// Length of the JSON text; it is written when it fits into `room` with its closing zero.
SOFTNPU_C size_t softnpu_statistics(char* text, size_t room) {
  const std::string json = statistics();
  if (json.size() < room) std::memcpy(text, json.c_str(), json.size() + 1);
  return json.size();
}

SOFTNPU_C int softnpu_inject(const char* specs) {
  std::string problem;
  return inject(specs, &problem) ? kOk : fail(kAclParameter, "softnpu: %s", problem.c_str());
}

SOFTNPU_C void softnpu_chaos(uint64_t seed) { set_chaos(seed); }
SOFTNPU_C int softnpu_write_trace(const char* path) { return write_trace(path); }

SOFTNPU_C int softnpu_check_red_zones() {
  const std::string problem = check_red_zones();
  return problem.empty() ? kOk : fail(kWriteOutOfBounds, "%s", problem.c_str());
}

// For tests of the guards: writes as a kernel would, without any check of the range.
SOFTNPU_C void softnpu_raw_write(void* device_pointer, size_t offset, unsigned char value) {
  const Range range = resolve(device_pointer, 0, -1, "softnpu_raw_write");
  static_cast<volatile unsigned char*>(range.alias)[offset] = value;
}
