// HCCL's C interface. A collective is a task on the caller's stream; buffers are checked at the call and when it runs.
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include "comm.h"
#include "softnpu/acl/device.h"
#include "softnpu/acl/memory.h"
#include "softnpu/acl/report.h"
#include "softnpu/acl/stream.h"

namespace softnpu {
namespace {

enum Result : int { kHcclOk = 0, kHcclParameter = 1, kHcclInternal = 4, kHcclNotFound = 6, kHcclRemote = 21 };
constexpr size_t kRootInfoBytes = 4108;

struct Comms {
  std::mutex mutex;
  std::map<Handle, std::shared_ptr<Comm>> all;
};

Comms& comms() {
  static auto* const instance = new Comms;
  return *instance;
}

std::shared_ptr<Comm> find(Handle handle) {
  std::lock_guard lock(comms().mutex);
  const auto found = comms().all.find(handle);
  if (found == comms().all.end()) throw Fault(kParameter, "softnpu: not a live communicator");
  return found->second;
}

template <class Action>
int guarded(Action action) try {
  action();
  return kHcclOk;
} catch (const Fault& fault) {
  fail(fault);
  return fault.code == kParameter ? kHcclParameter : kHcclInternal;
}

int create(const std::string& name, uint32_t ranks, uint32_t rank, Handle* handle) {
  return guarded([&] {
    auto comm = std::make_shared<Comm>(name, static_cast<int>(ranks), static_cast<int>(rank));
    std::lock_guard lock(comms().mutex);
    *handle = comm.get();
    comms().all[comm.get()] = comm;
  });
}

// A device buffer of a collective.
struct Buffer {
  const void* pointer;
  size_t bytes;
  unsigned char* get(const char* who) const {
    return bytes ? static_cast<unsigned char*>(resolve(pointer, bytes, current_device(), who).alias) : nullptr;
  }
  unsigned char* later(const char* who) const {
    return bytes ? static_cast<unsigned char*>(resolve(pointer, bytes, -1, who).alias) : nullptr;
  }
};

// What fails on one rank fails on all: a rank that stays away would shift everybody's rounds.
void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm, std::function<void()> run) {
  count_launch(name, 0);
  const std::string text = std::string(name) + ": ";
  const auto failed = [comm, text](const std::string& why) { comm->fail_all(text + why); };
  find_stream(stream, current_device())->push({.name = name, .run = std::move(run), .failed = failed});
}

// A collective: first all ranks say the same of it. -1: may differ.
void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm, std::array<int64_t, 4> said,
            std::function<void()> run) {
  Agreement mine{{}, said[0], said[1], said[2], said[3]};
  std::snprintf(mine.call, sizeof mine.call, "%s", name);
  launch(name, stream, comm, [comm, mine, run = std::move(run)] {
    comm->agree(mine);
    run();
  });
}

size_t bytes_of(uint64_t count, int dtype) {
  if (count > uint64_t{1} << 46) throw Fault(kParameter, "softnpu: count " + std::to_string(count));
  return count * element_size(dtype);
}

void check_reduction(int op) {
  if (op < 0 || op > 3) throw Fault(kParameter, "softnpu: reduction " + std::to_string(op) + ", expected 0 to 3");
}

int known_rank(uint32_t rank, const Comm& comm, const char* what) {
  if (rank >= static_cast<uint32_t>(comm.ranks))
    throw Fault(kParameter, "softnpu: " + std::string(what) + " " + std::to_string(rank) + " of " +
                                std::to_string(comm.ranks) + " ranks");
  return static_cast<int>(rank);
}

struct Item {  // HcclSendRecvItem; kind 0 sends, 1 receives
  int kind;
  void* data;
  uint64_t count;
  int dtype;
  uint32_t peer;
};

struct Pending {
  std::shared_ptr<Comm> comm;
  Handle stream;
  bool send;
  Buffer buffer;
  int peer;
};

thread_local int group_depth = 0;
thread_local std::vector<Pending> group;

void launch_transfers(const std::vector<Pending>& items, const char* name) {
  std::map<std::pair<Comm*, Handle>, std::vector<Pending>> batches;
  for (const Pending& item : items) batches[{item.comm.get(), item.stream}].push_back(item);
  for (const auto& [key, batch] : batches) {
    for (const Pending& item : batch) item.buffer.get(name);
    launch(name, key.second, batch[0].comm, [batch = batch, name] {
      std::vector<Transfer> transfers;
      for (const Pending& item : batch)
        transfers.push_back({item.send, item.buffer.later(name), item.buffer.bytes, item.peer});
      batch[0].comm->transfer(std::move(transfers));
    });
  }
}

int add_transfer(Handle comm, Handle stream, bool send, const void* data, uint64_t count, int dtype, uint32_t peer,
                 const char* name) {
  return guarded([&] {
    const auto found = find(comm);
    const Pending item{found, stream, send, {data, bytes_of(count, dtype)}, known_rank(peer, *found, "peer")};
    if (group_depth)
      group.push_back(item);
    else
      launch_transfers({item}, name);
  });
}

using Counts = std::vector<std::pair<size_t, size_t>>;  // bytes and displacement of each rank's part

Counts uneven(const void* counts, const void* displacements, size_t ranks, size_t width) {
  Counts result;
  for (size_t i = 0; i < ranks; ++i)
    result.emplace_back(static_cast<const uint64_t*>(counts)[i] * width,
                        static_cast<const uint64_t*>(displacements)[i] * width);
  return result;
}

Counts even(size_t bytes, size_t ranks) {
  Counts result;
  for (size_t i = 0; i < ranks; ++i) result.emplace_back(bytes, i * bytes);
  return result;
}

Buffer whole(const void* data, const Counts& parts) {
  size_t end = 0;
  for (const auto& [bytes, at] : parts) end = std::max(end, bytes ? at + bytes : 0);
  return {data, end};
}

std::vector<Piece> pieces(unsigned char* base, const Counts& parts) {
  std::vector<Piece> result;
  for (const auto& [bytes, at] : parts) result.push_back({base ? base + at : nullptr, bytes});
  return result;
}

void all_to_all(const char* name, Handle handle, Handle stream, const void* send, const Counts& out,
                const void* receive, const Counts& in, int dtype, int root = -1) {
  const auto comm = find(handle);
  const Buffer from = whole(send, out), to = whole(receive, in);
  from.get(name), to.get(name);
  launch(name, stream, comm, {-1, dtype, -1, root},
         [=] { comm->exchange(pieces(from.later(name), out), pieces(to.later(name), in)); });
}

void gather_all(const char* name, Handle handle, Handle stream, const void* send, size_t bytes, const void* receive,
                const Counts& in, int dtype) {
  const auto comm = find(handle);
  const Buffer from{send, bytes}, to = whole(receive, in);
  from.get(name), to.get(name);
  launch(name, stream, comm, {-1, dtype, -1, -1},
         [=] { comm->all_gather(from.later(name), bytes, pieces(to.later(name), in)); });
}

void reduce_all(const char* name, Handle handle, Handle stream, const void* send, const void* receive, size_t count,
                int dtype, int op, int root) {
  const auto comm = find(handle);
  check_reduction(op);
  const size_t bytes = bytes_of(count, dtype);
  const Buffer from{send, bytes}, to{receive, root < 0 || root == comm->rank ? bytes : 0};
  from.get(name), to.get(name);
  launch(name, stream, comm, {static_cast<int64_t>(count), dtype, op, root},
         [=] { comm->all_reduce(from.later(name), to.later(name), count, dtype, op, root); });
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int HcclGetRootInfo(char* info) {
  SOFTNPU_ENTER();
  std::memset(info, 0, kRootInfoBytes);
  std::snprintf(info, kRootInfoBytes, "softnpu-%d-%lx", getpid(), static_cast<unsigned long>(now_ns()));
  return kHcclOk;
}

SOFTNPU_C int HcclCommInitRootInfo(uint32_t ranks, const char* info, uint32_t rank, Handle* comm) {
  SOFTNPU_ENTER();
  return create(info, ranks, rank, comm);
}

SOFTNPU_C int HcclCommInitRootInfoConfig(uint32_t ranks, const char* info, uint32_t rank, const void*, Handle* comm) {
  SOFTNPU_ENTER();
  return create(info, ranks, rank, comm);
}

SOFTNPU_C int HcclCreateSubCommConfig(Handle* parent, uint32_t ranks, uint32_t*, uint64_t id, uint32_t rank, void*,
                                      Handle* comm) {
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

SOFTNPU_C int HcclAllReduce(void* send, void* receive, uint64_t count, int dtype, int op, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { reduce_all("HcclAllReduce", comm, stream, send, receive, count, dtype, op, -1); });
}

SOFTNPU_C int HcclReduce(void* send, void* receive, uint64_t count, int dtype, int op, uint32_t root, Handle comm,
                         Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    reduce_all("HcclReduce", comm, stream, send, receive, count, dtype, op, known_rank(root, *find(comm), "root"));
  });
}

SOFTNPU_C int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t root, Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    const Buffer buffer{data, bytes_of(count, dtype)};
    const int from = known_rank(root, *comm, "root");
    buffer.get("HcclBroadcast");
    launch("HcclBroadcast", stream, comm, {static_cast<int64_t>(count), dtype, -1, from},
           [=] { comm->broadcast(buffer.later("HcclBroadcast"), buffer.bytes, from); });
  });
}

SOFTNPU_C int HcclAllGather(void* send, void* receive, uint64_t count, int dtype, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t bytes = bytes_of(count, dtype);
    gather_all("HcclAllGather", comm, stream, send, bytes, receive, even(bytes, static_cast<size_t>(find(comm)->ranks)),
               dtype);
  });
}

SOFTNPU_C int HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* displacements,
                             int dtype, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t width = element_size(dtype);
    gather_all("HcclAllGatherV", comm, stream, send, count * width, receive,
               uneven(counts, displacements, static_cast<size_t>(find(comm)->ranks), width), dtype);
  });
}

SOFTNPU_C int HcclReduceScatter(void* send, void* receive, uint64_t count, int dtype, int op, Handle handle,
                                Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    const size_t bytes = bytes_of(count, dtype);
    const Buffer from{send, bytes * static_cast<size_t>(comm->ranks)}, to{receive, bytes};
    from.get("HcclReduceScatter"), to.get("HcclReduceScatter");
    check_reduction(op);
    launch("HcclReduceScatter", stream, comm, {static_cast<int64_t>(count), dtype, op, -1}, [=] {
      comm->reduce_scatter(from.later("HcclReduceScatter"), to.later("HcclReduceScatter"), count, dtype, op);
    });
  });
}

SOFTNPU_C int HcclAlltoAll(const void* send, uint64_t send_count, int send_type, const void* receive, uint64_t count,
                           int type, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto ranks = static_cast<size_t>(find(comm)->ranks);
    all_to_all("HcclAlltoAll", comm, stream, send, even(bytes_of(send_count, send_type), ranks), receive,
               even(bytes_of(count, type), ranks), type);
  });
}

SOFTNPU_C int HcclAlltoAllV(const void* send, const void* send_counts, const void* send_at, int send_type,
                            const void* receive, const void* counts, const void* at, int type, Handle comm,
                            Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {  // the counts are host arrays that need not live longer than this call
    const auto ranks = static_cast<size_t>(find(comm)->ranks);
    all_to_all("HcclAlltoAllV", comm, stream, send, uneven(send_counts, send_at, ranks, element_size(send_type)),
               receive, uneven(counts, at, ranks, element_size(type)), type);
  });
}

SOFTNPU_C int HcclScatter(void* send, void* receive, uint64_t count, int dtype, uint32_t root, Handle handle,
                          Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    const auto ranks = static_cast<size_t>(comm->ranks);
    const size_t bytes = bytes_of(count, dtype);
    const int from = known_rank(root, *comm, "root");
    Counts in(ranks, {0, 0});
    in[root] = {bytes, 0};
    const Counts out = comm->rank == from ? even(bytes, ranks) : Counts(ranks, {0, 0});
    all_to_all("HcclScatter", handle, stream, send, out, receive, in, dtype, from);
  });
}

SOFTNPU_C int HcclBarrier(Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    launch("HcclBarrier", stream, comm, {0, -1, -1, -1}, [] {});  // to agree is a barrier
  });
}

SOFTNPU_C int HcclSend(void* data, uint64_t count, int dtype, uint32_t peer, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return add_transfer(comm, stream, true, data, count, dtype, peer, "HcclSend");
}

SOFTNPU_C int HcclRecv(void* data, uint64_t count, int dtype, uint32_t peer, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return add_transfer(comm, stream, false, data, count, dtype, peer, "HcclRecv");
}

SOFTNPU_C int HcclBatchSendRecv(Item* items, uint32_t count, Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    std::vector<Pending> batch;
    for (uint32_t i = 0; i < count; ++i)
      batch.push_back({comm,
                       stream,
                       items[i].kind == 0,
                       {items[i].data, bytes_of(items[i].count, items[i].dtype)},
                       known_rank(items[i].peer, *comm, "peer")});
    launch_transfers(batch, "HcclBatchSendRecv");
  });
}

SOFTNPU_C int HcclGroupStart() {
  SOFTNPU_ENTER();
  ++group_depth;
  return kHcclOk;
}

SOFTNPU_C int HcclGroupEnd() {
  SOFTNPU_ENTER();
  if (group_depth == 0) return kHcclParameter;
  if (--group_depth) return kHcclOk;
  const std::vector<Pending> items = std::move(group);
  group.clear();
  return guarded([&] { launch_transfers(items, "HcclGroup"); });
}
