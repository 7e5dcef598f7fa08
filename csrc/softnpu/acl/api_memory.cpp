// Device and host memory, copies, fills, the reserve/map interface.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "config.h"
#include "device.h"
#include "memory.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

constexpr size_t kHostPage = 4096;

struct HostBlock {
  size_t size;
  uint64_t number;          // which life of the address
  bool registered = false;  // the caller's memory, pinned by aclrtHostRegisterV2
  bool pages = false;       // whole shared pages, which can have a second address
  void* device = nullptr;   // that address
};

struct HostBlocks {
  std::shared_mutex mutex;  // held shared while a copy runs
  std::map<uintptr_t, HostBlock> live;
  uint64_t next = 1;

  // Number of the pinned block that holds the address; 0: none. Under the lock.
  uint64_t holding(const void* pointer) const {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    auto it = live.upper_bound(at);
    return it != live.begin() && at < (--it)->first + it->second.size ? it->second.number : 0;
  }
};

HostBlocks& host_blocks() {
  static auto* const blocks = new HostBlocks;
  return *blocks;
}

struct Physical {
  int device;
  size_t size;
  void* mapped = nullptr;
};

// Blocks of physical memory that exist, and where they are mapped.
struct PhysicalBlocks {
  std::mutex mutex;
  std::map<Handle, Physical> live;
  uintptr_t next = 1;

  Physical& find(Handle handle) {
    const auto it = live.find(handle);
    if (it == live.end())
      throw Fault(kParameter, "softnpu: not a live physical memory handle (freed twice?)");
    return it->second;
  }
};

PhysicalBlocks& physical_blocks() {
  static auto* const blocks = new PhysicalBlocks;
  return *blocks;
}

// The address at which the host can copy from or to `pointer`, which must be on the side that
// `device_side` says.
void* side(const void* pointer, size_t bytes, bool device_side, const char* who) {
  if (device_side) return resolve(pointer, bytes, -1, who).alias;
  if (device_of(pointer) >= 0)
    throw Fault(kParameter, std::string("softnpu: ") + who +
                                ": a device pointer where the copy kind says host");
  return const_cast<void*>(pointer);
}

struct Copy {
  void* to;
  const void* from;
};

Copy plan(void* to, size_t room, const void* from, size_t count, int kind, const char* who) {
  if (count > room)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": " + std::to_string(count) +
                                " bytes into " + std::to_string(room));
  if (count == 0) return {nullptr, nullptr};
  const bool to_device =
      kind == kCopyDefault ? device_of(to) >= 0 : kind == kHostToDevice || kind == kDeviceToDevice;
  const bool from_device = kind == kCopyDefault ? device_of(from) >= 0
                                                : kind == kDeviceToHost || kind == kDeviceToDevice;
  if (kind < kHostToHost || kind > kCopyDefault)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": copy kind " + std::to_string(kind));
  return {side(to, count, to_device, who), side(from, count, from_device, who)};
}

int allocate(void** pointer, size_t size, const char* who) try {
  if (!pointer || size == 0) return fail(kParameter, "softnpu: %s: nothing to allocate", who);
  *pointer = device_malloc(require_device(), size);
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

// Checked when called, and again when the stream arrives there: the memory may have been freed in
// between.
int copy_later(void* to, size_t room, const void* from, size_t count, int kind, Handle handle,
               const char* who) try {
  const auto stream = find_stream(handle, current_device());
  plan(to, room, from, count, kind, who);
  const std::string name = who;
  uint64_t pinned_to = 0, pinned_from = 0;
  {
    std::shared_lock lock(host_blocks().mutex);
    pinned_to = host_blocks().holding(to), pinned_from = host_blocks().holding(from);
  }
  if ((device_of(to) < 0 && !pinned_to) || (device_of(from) < 0 && !pinned_from)) {
    refuse_in_capture((name + " of pageable host memory").c_str());
    stream->refuse_pageable(who);
  }
  const auto run = [=] {
    std::shared_lock lock(host_blocks().mutex);
    if (host_blocks().holding(to) != pinned_to || host_blocks().holding(from) != pinned_from)
      throw Fault(kKernelFault,
                  "softnpu: " + name + ": pinned host memory was freed before the copy ran");
    const Copy copy = plan(to, room, from, count, kind, name.c_str());
    if (count) std::memmove(copy.to, copy.from, count);
  };
  stream->push({name, run, false, std::to_string(count) + " bytes"});
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

template <class Action>
int guarded(Action action) try {
  action();
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclrtMalloc(void** pointer, size_t size, int) {
  SOFTNPU_ENTER();
  return allocate(pointer, size, __func__);
}

SOFTNPU_C int aclrtMallocAlign32(void** pointer, size_t size, int) {
  SOFTNPU_ENTER();
  return allocate(pointer, size, __func__);
}

SOFTNPU_C int aclrtFree(void* pointer) {
  SOFTNPU_ENTER();
  return guarded([&] { device_free(pointer); });
}

// Whole pages are shared ones, so that aclrtHostRegister can map them a second time.
SOFTNPU_C int aclrtMallocHost(void** pointer, size_t size) {
  SOFTNPU_ENTER();
  const bool pages = size && size % kHostPage == 0;
  void* block = pages
                    ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
                    : std::aligned_alloc(64, (size + 63) / 64 * 64);
  if (!block || block == MAP_FAILED) return fail(kOutOfMemory, "softnpu: out of host memory");
  *pointer = block;
  std::lock_guard lock(host_blocks().mutex);
  host_blocks().live[reinterpret_cast<uintptr_t>(block)] = {size, host_blocks().next++, false,
                                                            pages};
  alive(Alive::kHostMemory, 1);
  return kOk;
}

SOFTNPU_C int aclrtFreeHost(void* pointer) {
  SOFTNPU_ENTER();
  std::lock_guard lock(host_blocks().mutex);
  const auto block = host_blocks().live.find(reinterpret_cast<uintptr_t>(pointer));
  if (block == host_blocks().live.end() || block->second.registered)
    return fail(kParameter, "softnpu: aclrtFreeHost: not allocated (freed twice?)");
  if (block->second.device)
    return fail(kParameter, "softnpu: aclrtFreeHost: still registered (aclrtHostUnregister)");
  if (block->second.pages)
    munmap(pointer, block->second.size);
  else
    std::free(pointer);
  host_blocks().live.erase(block);
  alive(Alive::kHostMemory, -1);
  return kOk;
}

// Pins memory of the caller; what the flags say beyond that (a device address) is not emulated.
SOFTNPU_C int aclrtHostRegisterV2(void* pointer, uint64_t size, uint32_t) {
  SOFTNPU_ENTER();
  if (!pointer || size == 0) return fail(kParameter, "softnpu: aclrtHostRegisterV2: no memory");
  if (device_of(pointer) >= 0)
    return fail(kParameter, "softnpu: aclrtHostRegisterV2: a device pointer");
  std::lock_guard lock(host_blocks().mutex);
  if (host_blocks().holding(pointer))
    return fail(kParameter, "softnpu: aclrtHostRegisterV2: the memory is pinned already");
  host_blocks().live[reinterpret_cast<uintptr_t>(pointer)] = {size, host_blocks().next++, true};
  return kOk;
}

// Gives a block of aclrtMallocHost a device address, if it is whole pages.
SOFTNPU_C int aclrtHostRegister(void* pointer, uint64_t size, int type, void** device) {
  SOFTNPU_ENTER();
  return guarded([&] {
    if (type != 0)  // ACL_HOST_REGISTER_MAPPED
      throw Fault(kParameter, "softnpu: aclrtHostRegister: type " + std::to_string(type));
    std::lock_guard lock(host_blocks().mutex);
    const auto block = host_blocks().live.find(reinterpret_cast<uintptr_t>(pointer));
    if (block == host_blocks().live.end() || !block->second.pages)
      throw Fault(
          kFeature,
          "softnpu: aclrtHostRegister: not a block of aclrtMallocHost of whole pages; other "
          "memory has no device address here (not emulated)");
    if (block->second.device || size == 0 || size > block->second.size)
      throw Fault(kParameter, "softnpu: aclrtHostRegister: registered already, or " +
                                  std::to_string(size) + " bytes of a block of " +
                                  std::to_string(block->second.size));
    *device = block->second.device = device_share(require_device(), pointer, block->second.size);
  });
}

SOFTNPU_C int aclrtHostUnregister(void* pointer) {
  SOFTNPU_ENTER();
  std::lock_guard lock(host_blocks().mutex);
  const auto block = host_blocks().live.find(reinterpret_cast<uintptr_t>(pointer));
  if (block != host_blocks().live.end() && block->second.device) {
    return guarded([&] { device_unshare(std::exchange(block->second.device, nullptr)); });
  }
  if (block == host_blocks().live.end() || !block->second.registered)
    return fail(kParameter, "softnpu: aclrtHostUnregister: not registered (twice?)");
  host_blocks().live.erase(block);
  return kOk;
}

SOFTNPU_C int aclrtGetMemInfo(int, size_t* free, size_t* total) {
  SOFTNPU_ENTER();
  return guarded([&] { device_memory_info(require_device(), free, total); });
}

SOFTNPU_C int aclrtMemcpy(void* to, size_t room, const void* from, size_t count, int kind) {
  SOFTNPU_ENTER();
  return guarded([&] {
    refuse_in_capture("aclrtMemcpy");
    const Copy copy = plan(to, room, from, count, kind, "aclrtMemcpy");
    if (count) std::memmove(copy.to, copy.from, count);
  });
}

SOFTNPU_C int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t count, int kind,
                               Handle stream) {
  SOFTNPU_ENTER();
  return copy_later(to, room, from, count, kind, stream, __func__);
}

SOFTNPU_C int aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t count,
                                            int kind, Handle stream) {
  SOFTNPU_ENTER();
  return copy_later(to, room, from, count, kind, stream, __func__);
}

SOFTNPU_C int aclrtMemset(void* pointer, size_t room, int32_t value, size_t count) {
  SOFTNPU_ENTER();
  if (count > room)
    return fail(kParameter, "softnpu: aclrtMemset: %zu bytes into %zu", count, room);
  return guarded([&] {
    refuse_in_capture("aclrtMemset");
    std::memset(resolve(pointer, count, -1, "aclrtMemset").alias, value, count);
  });
}

SOFTNPU_C int aclrtMemsetAsync(void* pointer, size_t room, int32_t value, size_t count,
                               Handle handle) {
  SOFTNPU_ENTER();
  if (count > room)
    return fail(kParameter, "softnpu: aclrtMemsetAsync: %zu bytes into %zu", count, room);
  return guarded([&] {
    resolve(pointer, count, -1, "aclrtMemsetAsync");
    find_stream(handle, current_device())
        ->push({"aclrtMemsetAsync", [=] {
                  std::memset(resolve(pointer, count, -1, "aclrtMemsetAsync").alias, value, count);
                }});
  });
}

// struct { struct { uint32_t id; int type; } location; ... }; type 0 host, 1 device, 2
// unregistered.
SOFTNPU_C int aclrtPointerGetAttributes(const void* pointer, uint32_t* attributes) {
  SOFTNPU_ENTER();
  const int device = device_of(pointer);
  std::shared_lock lock(host_blocks().mutex);
  const bool pinned = host_blocks().holding(pointer);
  attributes[0] = device >= 0 ? static_cast<uint32_t>(device) : 0;
  attributes[1] = device >= 0 ? 1 : pinned ? 0 : 2;
  return kOk;
}

// torch_npu asks before any device is set, to see whether the driver can.
SOFTNPU_C int aclrtReserveMemAddress(void** pointer, size_t size, size_t, void*, uint64_t) {
  SOFTNPU_ENTER();
  return guarded([&] { *pointer = device_reserve(std::max(0, current_device()), size); });
}

SOFTNPU_C int aclrtReleaseMemAddress(void* pointer) {
  SOFTNPU_ENTER();
  return guarded([&] { device_release(pointer); });
}

SOFTNPU_C int aclrtMallocPhysical(Handle* handle, size_t size, const void*, uint64_t) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const int device = require_device();
    device_charge(device, static_cast<int64_t>(size));
    std::lock_guard lock(physical_blocks().mutex);
    *handle = reinterpret_cast<Handle>(physical_blocks().next++);
    physical_blocks().live[*handle] = {device, size};
    alive(Alive::kDeviceMemory, 1);
  });
}

SOFTNPU_C int aclrtFreePhysical(Handle handle) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(physical_blocks().mutex);
    const Physical& physical = physical_blocks().find(handle);
    if (physical.mapped) throw Fault(kParameter, "softnpu: aclrtFreePhysical: still mapped");
    device_charge(physical.device, -static_cast<int64_t>(physical.size));
    physical_blocks().live.erase(handle);
    alive(Alive::kDeviceMemory, -1);
  });
}

SOFTNPU_C int aclrtMapMem(void* pointer, size_t size, size_t, Handle handle, uint64_t) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(physical_blocks().mutex);
    Physical& physical = physical_blocks().find(handle);
    if (physical.mapped)
      throw Fault(kParameter, "softnpu: aclrtMapMem: the physical memory is mapped already");
    if (size > physical.size)
      throw Fault(kParameter, "softnpu: aclrtMapMem: " + std::to_string(size) +
                                  " bytes of a block of " + std::to_string(physical.size));
    device_map(pointer, size);
    physical.mapped = pointer;
  });
}

SOFTNPU_C int aclrtUnmapMem(void* pointer) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::lock_guard lock(physical_blocks().mutex);
    device_unmap(pointer);
    for (auto& [handle, physical] : physical_blocks().live)
      if (physical.mapped == pointer) physical.mapped = nullptr;
  });
}
