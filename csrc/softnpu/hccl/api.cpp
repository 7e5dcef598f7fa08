// HCCL's C interface: communicators, and what its other entry points share.
#include "api.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "softnpu/acl/device.h"
#include "softnpu/acl/memory.h"
#include "softnpu/acl/stream.h"
#include "types.h"

namespace softnpu::hccl {
namespace {

constexpr size_t kRootInfoBytes = 4108;

struct Comms {
  std::mutex mutex;
  std::map<Handle, std::shared_ptr<Comm>> all;
  std::set<std::pair<std::string, uint32_t>>
      used;  // root infos and the ranks that joined with them
};

Comms& comms() {
  static auto* const instance = new Comms;
  return *instance;
}

int create(const std::string& name, uint32_t ranks, uint32_t rank, Handle* handle) {
  return guarded([&] {
    const auto segment = std::make_shared<Segment>(name, static_cast<int>(ranks));
    auto comm = std::make_shared<Comm>(segment, static_cast<int>(rank));
    std::lock_guard lock(comms().mutex);
    *handle = comm.get();
    comms().all[comm.get()] = comm;
  });
}

// Our reading: a root info serves one communicator, since the one who made it listens for that one
// only.
int create_once(const std::string& info, uint32_t ranks, uint32_t rank, Handle* handle) {
  const int code = guarded([&] {
    std::lock_guard lock(comms().mutex);
    if (!comms().used.emplace(info, rank).second)
      throw Fault(kParameter, "softnpu: root info " + info +
                                  " was used by this rank before: a new communicator needs a " +
                                  "new one (was an old entry of the store read?)");
  });
  return code ? code : create(info, ranks, rank, handle);
}

}  // namespace

int result_of(const Fault& fault) {
  fail(fault);
  return fault.code == kParameter ? kHcclParameter
         : fault.code == kFeature ? kHcclNotSupported
                                  : kHcclInternal;
}

std::shared_ptr<Comm> find(Handle handle) {
  std::lock_guard lock(comms().mutex);
  const auto found = comms().all.find(handle);
  if (found == comms().all.end()) throw Fault(kParameter, "softnpu: not a live communicator");
  return found->second;
}

std::shared_ptr<Comm> find_named(const std::string& name) {
  std::lock_guard lock(comms().mutex);
  for (const auto& [handle, comm] : comms().all)
    if (comm->name == name) return comm;
  return nullptr;
}

unsigned char* Buffer::get(const char* who) const {
  return bytes ? static_cast<unsigned char*>(resolve(pointer, bytes, current_device(), who).alias)
               : nullptr;
}

unsigned char* Buffer::later(const char* who) const {
  return bytes ? static_cast<unsigned char*>(resolve(pointer, bytes, -1, who).alias) : nullptr;
}

void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm,
            std::function<void()> run) {
  count_launch(name, 0);
  const std::string text = std::string(name) + ": ";
  const auto failed = [comm, text](const std::string& why) { comm->fail_all(text + why); };
  find_stream(stream, current_device())
      ->push({.name = name, .run = std::move(run), .failed = failed});
}

void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm,
            std::array<int64_t, 4> said, std::function<void()> run) {
  Agreement mine{{}, said[0], said[1], said[2], said[3]};
  std::snprintf(mine.call, sizeof mine.call, "%s", name);
  launch(name, stream, comm, [comm, mine, run = std::move(run)] { comm->collective(mine, run); });
}

size_t bytes_of(uint64_t count, int dtype) {
  if (count > uint64_t{1} << 46) throw Fault(kParameter, "softnpu: count " + std::to_string(count));
  return count * element_size(dtype);
}

int known_rank(uint32_t rank, const Comm& comm, const char* what) {
  if (rank >= static_cast<uint32_t>(comm.ranks))
    throw Fault(kParameter, "softnpu: " + std::string(what) + " " + std::to_string(rank) + " of " +
                                std::to_string(comm.ranks) + " ranks");
  return static_cast<int>(rank);
}

}  // namespace softnpu::hccl

using namespace softnpu;
using namespace softnpu::hccl;

SOFTNPU_C int HcclGetRootInfo(char* info) {
  SOFTNPU_ENTER();
  std::memset(info, 0, kRootInfoBytes);
  std::snprintf(info, kRootInfoBytes, "softnpu-%d-%lx", getpid(),
                static_cast<unsigned long>(now_ns()));
  return kHcclOk;
}

// All ranks in this process, one for each device. They wait for each other, so each has a thread.
SOFTNPU_C int HcclCommInitAll(uint32_t ranks, const int32_t* devices, Handle* handles) {
  SOFTNPU_ENTER();
  for (uint32_t i = 0; i < ranks; ++i)
    for (uint32_t j = 0; j < i; ++j)
      if (devices[i] == devices[j])
        return fail(kHcclParameter, "softnpu: HcclCommInitAll: device %d twice", devices[i]);
  std::vector<char> info(kRootInfoBytes);
  if (const int code = HcclGetRootInfo(info.data())) return code;
  std::vector<int> codes(ranks, kHcclOk);
  std::vector<std::string> reasons(ranks);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      codes[rank] = create(info.data(), ranks, rank, &handles[rank]);
      if (codes[rank]) reasons[rank] = last_message();
    });
  for (std::thread& thread : threads) thread.join();
  for (uint32_t rank = 0; rank < ranks; ++rank)
    if (codes[rank]) return fail(codes[rank], "%s", reasons[rank].c_str());
  return kHcclOk;
}

SOFTNPU_C int HcclCommInitRootInfo(uint32_t ranks, const char* info, uint32_t rank, Handle* comm) {
  SOFTNPU_ENTER();
  return create_once(info, ranks, rank, comm);
}

SOFTNPU_C int HcclCommInitRootInfoConfig(uint32_t ranks, const char* info, uint32_t rank,
                                         const void*, Handle* comm) {
  SOFTNPU_ENTER();
  return create_once(info, ranks, rank, comm);
}

SOFTNPU_C int HcclCreateSubCommConfig(Handle* parent, uint32_t ranks, uint32_t*, uint64_t id,
                                      uint32_t rank, void*, Handle* comm) {
  SOFTNPU_ENTER();
  std::string name;
  const int code = guarded([&] { name = find(*parent)->name + "-" + std::to_string(id); });
  return code ? code : create(name, ranks, rank, comm);
}

SOFTNPU_C int HcclCommDestroy(Handle comm) {
  SOFTNPU_ENTER();
  std::lock_guard lock(comms().mutex);
  return comms().all.erase(comm) ? kHcclOk : kHcclNotFound;
}

SOFTNPU_C int HcclGetCommName(Handle comm, char* name) {
  SOFTNPU_ENTER();
  return guarded([&] { std::snprintf(name, 128, "%s", find(comm)->name.c_str()); });
}

SOFTNPU_C int HcclGetCommAsyncError(Handle comm, int* error) {
  SOFTNPU_ENTER();
  return guarded([&] { *error = find(comm)->error ? kHcclRemote : kHcclOk; });
}

SOFTNPU_C uint32_t HcclGetCommConfigCapability() { return 0; }
SOFTNPU_C int HcclSetConfig(int, int64_t) { return kHcclOk; }
SOFTNPU_C const char* HcclGetErrorString(int) { return last_message(); }
