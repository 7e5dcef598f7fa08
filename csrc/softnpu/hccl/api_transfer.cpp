// HcclSend, HcclRecv and groups of them.
#include <map>
#include <vector>

#include "api.h"

namespace softnpu::hccl {
namespace {

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

int add_transfer(Handle comm, Handle stream, bool send, const void* data, uint64_t count, int dtype,
                 uint32_t peer, const char* name) {
  return guarded([&] {
    const auto found = find(comm);
    const Pending item{
        found, stream, send, {data, bytes_of(count, dtype)}, known_rank(peer, *found, "peer")};
    if (group_depth)
      group.push_back(item);
    else
      launch_transfers({item}, name);
  });
}

}  // namespace
}  // namespace softnpu::hccl

using namespace softnpu;
using namespace softnpu::hccl;

SOFTNPU_C int HcclSend(void* data, uint64_t count, int dtype, uint32_t peer, Handle comm,
                       Handle stream) {
  SOFTNPU_ENTER();
  return add_transfer(comm, stream, true, data, count, dtype, peer, "HcclSend");
}

SOFTNPU_C int HcclRecv(void* data, uint64_t count, int dtype, uint32_t peer, Handle comm,
                       Handle stream) {
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
