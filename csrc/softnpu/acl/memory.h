// Device memory in two address windows: device pointers lie in a window that the host can never
// read or write; kernels work through an alias at a constant distance, after the range has been
// checked against live allocations.
#pragma once

#include <string>

#include "abi.h"

namespace softnpu {

struct Range {
  void* alias = nullptr;  // where a kernel may read and write
  uint64_t allocation =
      0;  // which life of the address: a later allocation there has another number
};

// Largest device allocation alignment that CANN promises.
inline constexpr size_t kAlignment = 512;

SOFTNPU_CXX void* device_malloc(int device, size_t size);  // throws Fault(kOutOfMemory)
SOFTNPU_CXX void device_free(
    void* pointer);  // throws Fault; checks the red zone behind the allocation
SOFTNPU_CXX void* device_reserve(int device, size_t size);  // addresses only
SOFTNPU_CXX void device_release(void* pointer);
SOFTNPU_CXX void device_charge(int device,
                               int64_t bytes);  // physical memory of the reserve/map interface
SOFTNPU_CXX void device_map(void* pointer, size_t size);
SOFTNPU_CXX void device_unmap(void* pointer);
// Device addresses of `size` bytes (whole pages) of shared host memory, until device_unshare().
SOFTNPU_CXX void* device_share(int device, void* host, size_t size);
SOFTNPU_CXX void device_unshare(void* pointer);
// `peak`: the most bytes that were ever in use at once.
SOFTNPU_CXX void device_memory_info(int device, size_t* free, size_t* total,
                                    size_t* peak = nullptr);

SOFTNPU_CXX int device_of(const void* pointer);  // -1: not a device address
// [pointer, pointer + bytes) as a kernel on `device` sees it; Fault when it is not wholly inside
// live memory of that device.
SOFTNPU_CXX Range resolve(const void* pointer, size_t bytes, int device, const char* who);
// Fault when the memory behind an earlier resolve() has been freed since.
SOFTNPU_CXX void still_alive(const void* pointer, size_t bytes, uint64_t allocation,
                             const char* who);
SOFTNPU_CXX std::string check_red_zones();  // "" or what was over-written
SOFTNPU_CXX void install_dereference_trap();
SOFTNPU_CXX std::string memory_statistics();

}  // namespace softnpu
