#include "memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>

#include "config.h"
#include "report.h"

namespace softnpu {
namespace {

#ifndef SOFTNPU_WINDOW_BYTES
#define SOFTNPU_WINDOW_BYTES (size_t{256} << 30)
#endif
constexpr size_t kWindow = SOFTNPU_WINDOW_BYTES;
constexpr size_t kPage = 4096;
constexpr unsigned char kFresh = 0xFF;  // NaN in every float format, -1 in integers
constexpr unsigned char kRedZone =
    0xB5;  // between the end of an allocation and the end of its last page
constexpr int kMaxDevices = 32;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

std::string hex(uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%lx", static_cast<unsigned long>(value));
  return text;
}

struct Allocation {
  size_t size, pages;
  uint64_t number;
  bool owns_addresses;  // false: mapped into a reserved range
};

// All addresses are device addresses; alias = address + kWindow.
struct DeviceMemory {
  std::mutex mutex;
  std::atomic<uintptr_t> base{0};
  uintptr_t cursor = 0;
  std::map<uintptr_t, Allocation> live;
  std::map<uintptr_t, size_t> reserved;
  size_t used = 0, peak = 0, allocations = 0;

  void open() {
    if (base) return;
    void* start =
        mmap(nullptr, 2 * kWindow, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
      throw Fault(kOutOfMemory,
                  std::string("softnpu: cannot reserve address space (ulimit -v?): ") +
                      std::strerror(errno));
    cursor = round_up(reinterpret_cast<uintptr_t>(start), size_t{2} << 20);
    base = cursor;
  }

  uintptr_t end() const { return base + kWindow - (size_t{2} << 20); }

  // First gap at or after the cursor, so that a freed address rests as long as possible before it
  // is used again.
  uintptr_t take_addresses(size_t pages) {
    for (const uintptr_t from : {cursor, base.load()}) {
      uintptr_t at = from;
      while (at + pages <= end()) {
        const uintptr_t blocked = blocking_end(at, pages);
        if (!blocked) return cursor = at + pages, at;
        at = blocked;
      }
    }
    throw Fault(kOutOfMemory, "softnpu: the device's address window is full");
  }

  uintptr_t blocking_end(uintptr_t at, size_t pages) const {
    if (auto it = live.lower_bound(at + pages);
        it != live.begin() && (--it, it->first + it->second.pages > at))
      return it->first + it->second.pages;
    if (auto it = reserved.lower_bound(at + pages);
        it != reserved.begin() && (--it, it->first + it->second > at))
      return it->first + it->second;
    return 0;
  }

  void charge(int64_t bytes) {
    if (bytes > 0 && used + static_cast<size_t>(bytes) > config().memory)
      throw Fault(kOutOfMemory, "softnpu: out of device memory: " + std::to_string(bytes) +
                                    " bytes asked, " + std::to_string(config().memory - used) +
                                    " of " + std::to_string(config().memory) + " free");
    used = static_cast<size_t>(static_cast<int64_t>(used) + bytes);
    peak = used > peak ? used : peak;
  }

  void open_pages(uintptr_t at, size_t size, size_t pages) {
    auto* alias = reinterpret_cast<unsigned char*>(at + kWindow);
    if (mprotect(alias, pages, PROT_READ | PROT_WRITE) != 0)
      throw Fault(kOutOfMemory, std::string("softnpu: mprotect: ") + std::strerror(errno) +
                                    " (too many live allocations for vm.max_map_count?)");
    std::memset(alias, kFresh, size);
    std::memset(alias + size, kRedZone, pages - size);
  }

  void close_pages(uintptr_t at, size_t pages) {
    void* alias = reinterpret_cast<void*>(at + kWindow);
    madvise(alias, pages, MADV_DONTNEED);
    mprotect(alias, pages, PROT_NONE);
  }

  std::string red_zone_problem(uintptr_t at, const Allocation& block) const {
    const auto* alias = reinterpret_cast<const unsigned char*>(at + kWindow);
    for (size_t i = block.size; i < block.pages; ++i) {
      if (alias[i] != kRedZone)
        return "softnpu: allocation " + hex(at) + " of " + std::to_string(block.size) +
               " bytes was over-written " + std::to_string(i - block.size) +
               " bytes behind its end";
    }
    return "";
  }

  std::map<uintptr_t, Allocation>::iterator holding(uintptr_t at) {
    auto it = live.upper_bound(at);
    if (it == live.begin()) return live.end();
    --it;
    return at < it->first + it->second.size || (at == it->first && it->second.size == 0)
               ? it
               : live.end();
  }
};

std::array<DeviceMemory, kMaxDevices>& devices() {
  static auto* const all = new std::array<DeviceMemory, kMaxDevices>;
  return *all;
}

std::atomic<uint64_t> next_number{1};

int window_of(uintptr_t at, uintptr_t distance) {
  for (int i = 0; i < kMaxDevices; ++i) {
    const uintptr_t base = devices()[static_cast<size_t>(i)].base.load(std::memory_order_acquire);
    if (base && at >= base + distance && at < base + distance + kWindow) return i;
  }
  return -1;
}

DeviceMemory& owner(const void* pointer, const char* who) {
  const int device = device_of(pointer);
  if (device < 0)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": " +
                                hex(reinterpret_cast<uintptr_t>(pointer)) +
                                " is not a device pointer");
  return devices()[static_cast<size_t>(device)];
}

struct sigaction previous_handler;

void describe(uintptr_t at) {
  char text[320];
  int length = 0;
  if (const int device = window_of(at, 0); device >= 0) {
    length = std::snprintf(text, sizeof text,
                           "\nsoftnpu: host code dereferenced the device pointer 0x%lx (device "
                           "%d): copy to the host first\n",
                           static_cast<unsigned long>(at), device);
  } else if (const int alias = window_of(at, kWindow); alias >= 0) {
    length = std::snprintf(
        text, sizeof text,
        "\nsoftnpu: a kernel touched 0x%lx (device %d), which is in no live allocation: out of "
        "range or use after free\n",
        static_cast<unsigned long>(at - kWindow), alias);
  }
  if (length > 0 && write(2, text, static_cast<size_t>(length)) < 0) _exit(139);
}

void on_segv(int signal, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by kill(), not by an access
  if (!sent) describe(reinterpret_cast<uintptr_t>(info->si_addr));
  if (previous_handler.sa_flags & SA_SIGINFO && previous_handler.sa_sigaction) {
    previous_handler.sa_sigaction(signal, info, context);
    return;
  }
  sigaction(SIGSEGV, &previous_handler,
            nullptr);  // the faulting instruction runs again and ends the process
  if (sent) raise(signal);
}

}  // namespace

void install_dereference_trap() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_handler);
  });
}

void* device_malloc(int device, size_t size) {
  DeviceMemory& memory = devices()[static_cast<size_t>(device)];
  std::lock_guard lock(memory.mutex);
  memory.open();
  // One byte more than asked always lies in the last page, so that a red zone exists; a closed page
  // follows.
  const size_t pages = round_up(size + 1, kPage);
  memory.charge(static_cast<int64_t>(size));
  try {
    const uintptr_t at = memory.take_addresses(pages + kPage);
    memory.open_pages(at, size, pages);
    memory.live[at] = {size, pages, next_number++, true};
    memory.allocations++;
    alive(Alive::kDeviceMemory, 1);
    return reinterpret_cast<void*>(at);
  } catch (const Fault&) {
    memory.charge(-static_cast<int64_t>(size));
    throw;
  }
}

void device_free(void* pointer) {
  DeviceMemory& memory = owner(pointer, "aclrtFree");
  std::lock_guard lock(memory.mutex);
  const auto it = memory.live.find(reinterpret_cast<uintptr_t>(pointer));
  if (it == memory.live.end() || !it->second.owns_addresses)
    throw Fault(kParameter, "softnpu: aclrtFree: " + hex(reinterpret_cast<uintptr_t>(pointer)) +
                                " is no live allocation (freed twice?)");
  const std::string problem = memory.red_zone_problem(it->first, it->second);
  memory.close_pages(it->first, it->second.pages);
  memory.charge(-static_cast<int64_t>(it->second.size));
  memory.live.erase(it);
  alive(Alive::kDeviceMemory, -1);
  if (!problem.empty()) throw Fault(kWriteOutOfBounds, problem);
}

void* device_reserve(int device, size_t size) {
  DeviceMemory& memory = devices()[static_cast<size_t>(device)];
  std::lock_guard lock(memory.mutex);
  memory.open();
  memory.cursor = round_up(memory.cursor, size_t{2} << 20);
  const size_t pages = round_up(size, size_t{2} << 20);
  const uintptr_t at = memory.take_addresses(pages);
  memory.reserved[at] = pages;
  return reinterpret_cast<void*>(at);
}

void device_release(void* pointer) {
  DeviceMemory& memory = owner(pointer, "aclrtReleaseMemAddress");
  std::lock_guard lock(memory.mutex);
  const auto range = memory.reserved.find(reinterpret_cast<uintptr_t>(pointer));
  if (range == memory.reserved.end())
    throw Fault(kParameter, "softnpu: aclrtReleaseMemAddress: not a reserved address");
  const auto mapped = memory.live.lower_bound(range->first);
  if (mapped != memory.live.end() && mapped->first < range->first + range->second)
    throw Fault(kParameter,
                "softnpu: aclrtReleaseMemAddress: " + hex(mapped->first) + " is still mapped");
  memory.reserved.erase(range);
}

void device_charge(int device, int64_t bytes) {
  DeviceMemory& memory = devices()[static_cast<size_t>(device)];
  std::lock_guard lock(memory.mutex);
  memory.charge(bytes);
}

void device_map(void* pointer, size_t size) {
  DeviceMemory& memory = owner(pointer, "aclrtMapMem");
  std::lock_guard lock(memory.mutex);
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  auto range = memory.reserved.upper_bound(at);
  if (range == memory.reserved.begin() || at + size > (--range)->first + range->second)
    throw Fault(kParameter, "softnpu: aclrtMapMem: " + hex(at) + " + " + std::to_string(size) +
                                " bytes is not inside a reserved range");
  const auto next = memory.live.lower_bound(at);
  if (memory.holding(at) != memory.live.end() ||
      (next != memory.live.end() && next->first < at + size))
    throw Fault(kParameter, "softnpu: aclrtMapMem: already mapped");
  memory.open_pages(at, size, size);
  memory.live[at] = {size, size, next_number++, false};
}

void device_unmap(void* pointer) {
  DeviceMemory& memory = owner(pointer, "aclrtUnmapMem");
  std::lock_guard lock(memory.mutex);
  const auto it = memory.live.find(reinterpret_cast<uintptr_t>(pointer));
  if (it == memory.live.end() || it->second.owns_addresses)
    throw Fault(kParameter, "softnpu: aclrtUnmapMem: not mapped");
  memory.close_pages(it->first, it->second.pages);
  memory.live.erase(it);
}

void* device_share(int device, void* host, size_t size) {
  DeviceMemory& memory = devices()[static_cast<size_t>(device)];
  std::lock_guard lock(memory.mutex);
  memory.open();
  const uintptr_t at = memory.take_addresses(size + kPage);
  void* alias = reinterpret_cast<void*>(at + kWindow);
  // A length of 0 maps the pages of a shared mapping a second time.
  if (mremap(host, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, alias) == MAP_FAILED)
    throw Fault(kFeature,
                std::string("softnpu: host memory at device addresses: ") + std::strerror(errno));
  memory.live[at] = {size, size, next_number++, false};
  return reinterpret_cast<void*>(at);
}

void device_unshare(void* pointer) {
  DeviceMemory& memory = owner(pointer, "aclrtHostUnregister");
  std::lock_guard lock(memory.mutex);
  const auto it = memory.live.find(reinterpret_cast<uintptr_t>(pointer));
  if (it == memory.live.end()) return;
  mmap(reinterpret_cast<char*>(it->first + kWindow), it->second.pages, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  memory.live.erase(it);
}

void device_memory_info(int device, size_t* free, size_t* total, size_t* peak) {
  DeviceMemory& memory = devices()[static_cast<size_t>(device)];
  std::lock_guard lock(memory.mutex);
  *total = config().memory;
  *free = config().memory - memory.used;
  if (peak) *peak = memory.peak;
}

int device_of(const void* pointer) { return window_of(reinterpret_cast<uintptr_t>(pointer), 0); }

Range resolve(const void* pointer, size_t bytes, int device, const char* who) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const int home = device_of(pointer);
  if (home < 0)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": " + hex(at) +
                                " is not a device pointer (host memory given to a kernel?)");
  if (device >= 0 && home != device)
    throw Fault(kParameter, std::string("softnpu: ") + who + ": " + hex(at) +
                                " belongs to device " + std::to_string(home) + ", not " +
                                std::to_string(device));
  DeviceMemory& memory = devices()[static_cast<size_t>(home)];
  std::lock_guard lock(memory.mutex);
  auto it = memory.holding(at);
  if (it == memory.live.end())
    throw Fault(kReadOutOfBounds, std::string("softnpu: ") + who + ": " + hex(at) +
                                      " is in no live allocation (use after free?)");
  const uint64_t number = it->second.number;
  uintptr_t reach = it->first + it->second.size;
  // Neighbouring mapped segments of one reserved range count as one.
  while (bytes > reach - at && !it->second.owns_addresses && ++it != memory.live.end() &&
         it->first == reach)
    reach += it->second.size;
  if (bytes > reach - at)
    throw Fault(kReadOutOfBounds, std::string("softnpu: ") + who + ": " + hex(at) + " + " +
                                      std::to_string(bytes) + " bytes ends " +
                                      std::to_string(bytes - (reach - at)) +
                                      " bytes behind its allocation");
  return {reinterpret_cast<void*>(at + kWindow), number};
}

void still_alive(const void* pointer, size_t bytes, uint64_t allocation, const char* who) {
  if (resolve(pointer, bytes, -1, who).allocation != allocation)
    throw Fault(kReadOutOfBounds,
                std::string("softnpu: ") + who +
                    ": memory was freed and given away between launch and execution");
}

std::string check_red_zones() {
  for (DeviceMemory& memory : devices()) {
    std::lock_guard lock(memory.mutex);
    for (const auto& [at, block] : memory.live) {
      std::string problem = memory.red_zone_problem(at, block);
      if (problem.empty()) continue;
      std::memset(reinterpret_cast<char*>(at + kWindow) + block.size, kRedZone,
                  block.pages - block.size);  // reported once
      return problem;
    }
  }
  return "";
}

std::string memory_statistics() {
  std::ostringstream out;
  out << "[";
  for (int i = 0; i < config().devices && i < kMaxDevices; ++i) {
    DeviceMemory& memory = devices()[static_cast<size_t>(i)];
    std::lock_guard lock(memory.mutex);
    out << (i ? "," : "") << "{\"used\":" << memory.used << ",\"peak\":" << memory.peak
        << ",\"live\":" << memory.live.size() << ",\"allocations\":" << memory.allocations << "}";
  }
  out << "]";
  return out.str();
}

}  // namespace softnpu
