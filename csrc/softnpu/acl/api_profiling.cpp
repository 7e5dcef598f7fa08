// The profiler's start-up: configurations are accepted, and what was asked for stands in the trace
// (SOFTNPU_TRACE) as launches of no time. No profile is written: there is no hardware to sample.
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "registry.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

struct Configuration {
  std::vector<uint32_t> devices;
  int metrics;
  uint64_t data;
  bool started = false;
};

Registry<Configuration>& configurations() {
  static auto* const registry = new Registry<Configuration>;
  return *registry;
}

std::atomic<bool> begun{false};

template <class Action>
int guarded(Action action) try {
  action();
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

void record(const char* name, const std::string& arguments) {
  const uint64_t now = now_ns();
  if (tracing()) trace({name, arguments, current_device(), -1, 0, now, now, now});
}

std::string shown(const Configuration& configuration) {
  std::string text = "devices";
  for (const uint32_t device : configuration.devices) text += " " + std::to_string(device);
  return text + ", metrics " + std::to_string(configuration.metrics) + ", data " +
         std::to_string(configuration.data);
}

void need_begun(const char* who) {
  if (!begun)
    throw Fault(kParameter,
                std::string("softnpu: ") + who + " before aclprofInit, or after aclprofFinalize");
}

// The pages give the order: init, start, stop, finalize.
void toggle(Handle handle, bool start, const char* who) {
  need_begun(who);
  const auto configuration = configurations().find(handle, "profiling configuration");
  if (configuration->started == start)
    throw Fault(kParameter,
                std::string("softnpu: ") + who + (start ? ": started already" : ": not started"));
  configuration->started = start;
  record(who, shown(*configuration));
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclprofInit(const char* path, size_t length) {
  SOFTNPU_ENTER();
  return guarded([&] {
    if (!path || length == 0) throw Fault(kParameter, "softnpu: aclprofInit: no path");
    if (begun.exchange(true)) throw Fault(kParameter, "softnpu: aclprofInit: begun already");
    record("aclprofInit", std::string(path, strnlen(path, length)));
  });
}

SOFTNPU_C int aclprofFinalize() {
  SOFTNPU_ENTER();
  return guarded([&] {
    need_begun("aclprofFinalize");
    begun = false;
    record("aclprofFinalize", "");
  });
}

SOFTNPU_C Handle aclprofCreateConfig(const uint32_t* devices, uint32_t count, int metrics,
                                     const void*, uint64_t data) {
  static constinit Call call{"aclprofCreateConfig"};
  if (call.enter() || (count && !devices)) return nullptr;
  return configurations().add(
      std::make_shared<Configuration>(Configuration{{devices, devices + count}, metrics, data}));
}

SOFTNPU_C int aclprofDestroyConfig(Handle configuration) {
  SOFTNPU_ENTER();
  return guarded([&] { configurations().remove(configuration, "profiling configuration"); });
}

SOFTNPU_C int aclprofStart(Handle configuration) {
  SOFTNPU_ENTER();
  return guarded([&] { toggle(configuration, true, "aclprofStart"); });
}

SOFTNPU_C int aclprofStop(Handle configuration) {
  SOFTNPU_ENTER();
  return guarded([&] { toggle(configuration, false, "aclprofStop"); });
}

SOFTNPU_C int aclprofWarmup(Handle configuration) {
  SOFTNPU_ENTER();
  return guarded([&] { configurations().find(configuration, "profiling configuration"); });
}

SOFTNPU_C int aclprofSetConfig(int type, const char* value, size_t length) {
  SOFTNPU_ENTER();
  return guarded([&] {
    if (!value || length == 0) throw Fault(kParameter, "softnpu: aclprofSetConfig: no value");
    record("aclprofSetConfig",
           std::to_string(type) + " = " + std::string(value, strnlen(value, length)));
  });
}

SOFTNPU_C int aclprofMarkEx(const char* message, size_t length, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    if (!message || length == 0) throw Fault(kParameter, "softnpu: aclprofMarkEx: no message");
    const std::string text(message, strnlen(message, length));
    find_stream(stream, current_device())->push({"aclprofMarkEx", [] {}, false, text});
  });
}

// No callback is ever needed: devices that come later are recorded as well.
SOFTNPU_C int aclprofRegisterDeviceCallback() {
  SOFTNPU_ENTER();
  return kOk;
}
