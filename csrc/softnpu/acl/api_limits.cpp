// What a device is made of, how much of it a thread may use, and how much is in use. The core
// counts are those of public device files (docs/device.md); operators here use none of them.
#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>

#include "config.h"
#include "device.h"
#include "memory.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

constexpr size_t kKinds = 2;  // aclrtDevResLimitType: cube cores, vector cores
using Cores = std::array<uint32_t, kKinds>;

uint32_t cube_cores() {
  const std::string& soc = config().soc;
  if (generation() == Generation::kA5) return soc.starts_with("Ascend950DT") ? 32 : 28;
  if (soc.starts_with("Ascend910B3") || soc.starts_with("Ascend910B4")) return 20;
  return 24;
}

Cores all_cores() { return {cube_cores(), 2 * cube_cores()}; }

int64_t l2_bytes() { return int64_t{config().soc.starts_with("Ascend910B4") ? 96 : 192} << 20; }

// Limits by device, by stream, and what each thread chose to use.
struct Limits {
  std::mutex mutex;
  std::map<int, Cores> devices;
  std::map<Handle, Cores> streams;
};

Limits& limits() {
  static auto* const all = new Limits;
  return *all;
}

thread_local Handle stream_in_use = nullptr;

template <class Action>
int guarded(Action action) try {
  action();
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

size_t kind_of(int type, const char* who) {
  if (type < 0 || static_cast<size_t>(type) >= kKinds)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": resource type " +
                                std::to_string(type) + ", expected 0 (cube) or 1 (vector)");
  return static_cast<size_t>(type);
}

int checked_device(int device, const char* who) {
  if (device < 0 || device >= config().devices)
    throw Fault(kDeviceId, std::string("softnpu: ") + who + ": device " + std::to_string(device) +
                               " of " + std::to_string(config().devices));
  return device;
}

uint32_t checked_cores(size_t kind, uint32_t value, const char* who) {
  if (value == 0 || value > all_cores()[kind])
    throw Fault(kParameter, std::string("softnpu: ") + who + ": " + std::to_string(value) +
                                " cores, expected 1 to " + std::to_string(all_cores()[kind]));
  return value;
}

// Under the lock. A stream without limits of its own has those of its device.
Cores device_cores(int device) {
  const auto found = limits().devices.find(device);
  return found == limits().devices.end() ? all_cores() : found->second;
}
Cores stream_cores(Handle stream) {
  const auto found = limits().streams.find(stream);
  return found == limits().streams.end()
             ? device_cores(find_stream(stream, current_device())->device)
             : found->second;
}

[[noreturn]] void refuse_attribute(int attribute, const char* who) {
  throw Fault(kFeature, std::string("softnpu: ") + who + ": attribute " +
                            std::to_string(attribute) + " is not emulated");
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

// aclDeviceInfo: 0 AI cores, 1 vector cores, 2 bytes of L2.
SOFTNPU_C int aclGetDeviceCapability(uint32_t device, int attribute, int64_t* value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    checked_device(static_cast<int>(device), "aclGetDeviceCapability");
    switch (attribute) {
      case 0:
        *value = all_cores()[0];
        break;
      case 1:
        *value = all_cores()[1];
        break;
      case 2:
        *value = l2_bytes();
        break;
      default:
        refuse_attribute(attribute, "aclGetDeviceCapability");
    }
  });
}

// aclrtDevAttr, as its page numbers them.
SOFTNPU_C int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t* value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const int known = checked_device(static_cast<int>(device), "aclrtGetDeviceInfo");
    switch (attribute) {
      case 101:  // AI cores
      case 102:
        *value = all_cores()[0];
        break;
      case 201:
        *value = all_cores()[1];
        break;
      case 301:
        *value = static_cast<int64_t>(config().memory);
        break;
      case 302:
        *value = l2_bytes();
        break;
      case 402:
        *value = known;
        break;  // the chip
      case 501:
        *value = 0;
        break;  // not virtual
      default:
        refuse_attribute(attribute, "aclrtGetDeviceInfo");
    }
  });
}

SOFTNPU_C int aclrtSetDeviceResLimit(int32_t device, int type, uint32_t value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t kind = kind_of(type, "aclrtSetDeviceResLimit");
    checked_cores(kind, value, "aclrtSetDeviceResLimit");
    std::lock_guard lock(limits().mutex);
    Cores cores = device_cores(checked_device(device, "aclrtSetDeviceResLimit"));
    cores[kind] = value;
    limits().devices[device] = cores;
  });
}

SOFTNPU_C int aclrtGetDeviceResLimit(int32_t device, int type, uint32_t* value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(limits().mutex);
    const Cores cores = device_cores(checked_device(device, "aclrtGetDeviceResLimit"));
    *value = cores[kind_of(type, "aclrtGetDeviceResLimit")];
  });
}

SOFTNPU_C int aclrtResetDeviceResLimit(int32_t device) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(limits().mutex);
    limits().devices.erase(checked_device(device, "aclrtResetDeviceResLimit"));
  });
}

SOFTNPU_C int aclrtSetStreamResLimit(Handle stream, int type, uint32_t value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t kind = kind_of(type, "aclrtSetStreamResLimit");
    checked_cores(kind, value, "aclrtSetStreamResLimit");
    std::lock_guard lock(limits().mutex);
    Cores cores = stream_cores(stream);
    cores[kind] = value;
    limits().streams[stream] = cores;
  });
}

SOFTNPU_C int aclrtGetStreamResLimit(Handle stream, int type, uint32_t* value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(limits().mutex);
    *value = stream_cores(stream)[kind_of(type, "aclrtGetStreamResLimit")];
  });
}

SOFTNPU_C int aclrtResetStreamResLimit(Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(limits().mutex);
    limits().streams.erase(stream);
  });
}

SOFTNPU_C int aclrtUseStreamResInCurrentThread(Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    find_stream(stream, current_device());
    stream_in_use = stream;
  });
}

SOFTNPU_C int aclrtUnuseStreamResInCurrentThread(Handle) {
  SOFTNPU_ENTER();
  stream_in_use = nullptr;
  return kOk;
}

SOFTNPU_C int aclrtGetResInCurrentThread(int type, uint32_t* value) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t kind = kind_of(type, "aclrtGetResInCurrentThread");
    const int device = require_device();
    std::lock_guard lock(limits().mutex);
    *value = (stream_in_use ? stream_cores(stream_in_use) : device_cores(device))[kind];
  });
}

// struct { int32_t cube, vector, aicpu, memory; void* extension; }, in percent. Cores are never
// counted busy here; memory is what is allocated.
SOFTNPU_C int aclrtGetDeviceUtilizationRate(int32_t device, int32_t* percent) {
  SOFTNPU_ENTER();
  return guarded([&] {
    size_t free = 0, total = 0;
    device_memory_info(checked_device(device, "aclrtGetDeviceUtilizationRate"), &free, &total);
    std::fill_n(percent, 3, 0);
    percent[3] = static_cast<int32_t>((total - free) * 100 / total);
  });
}

namespace {
// aclrtMemUsageInfo: one user of memory.
struct MemoryUse {
  char name[32];
  uint64_t now, peak;
  size_t reserved[8];
};
}  // namespace

// One entry: the process itself, named app, which owns all that is allocated here.
SOFTNPU_C int aclrtGetMemUsageInfo(uint32_t device, MemoryUse* users, size_t room, size_t* count) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const int known = checked_device(static_cast<int>(device), "aclrtGetMemUsageInfo");
    if (!users || room == 0)
      throw Fault(kParameter, "softnpu: aclrtGetMemUsageInfo: no room for an entry");
    size_t free = 0, total = 0, peak = 0;
    device_memory_info(known, &free, &total, &peak);
    users[0] = {"app", total - free, peak, {}};
    *count = 1;
  });
}
