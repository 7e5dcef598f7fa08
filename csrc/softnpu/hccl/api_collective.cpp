// The collectives.
#include <algorithm>
#include <vector>

#include "api.h"
#include "types.h"

namespace softnpu::hccl {
namespace {

using Counts =
    std::vector<std::pair<size_t, size_t>>;  // bytes and displacement of each rank's part

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

Counts packed(const uint64_t* counts, size_t stride, size_t ranks, size_t width) {
  Counts result;
  for (size_t i = 0, at = 0; i < ranks; at += result[i++].first)
    result.emplace_back(counts[i * stride] * width, at);
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

void gather_all(const char* name, Handle handle, Handle stream, const void* send, size_t bytes,
                const void* receive, const Counts& in, int dtype) {
  const auto comm = find(handle);
  const Buffer from{send, bytes}, to = whole(receive, in);
  from.get(name), to.get(name);
  launch(name, stream, comm, {-1, dtype, -1, -1},
         [=] { comm->all_gather(from.later(name), bytes, pieces(to.later(name), in)); });
}

void scatter_reduced(const char* name, Handle handle, Handle stream, const void* send,
                     const Counts& out, const void* receive, int64_t count, int dtype, int op) {
  const auto comm = find(handle);
  const Buffer from = whole(send, out), to{receive, out[static_cast<size_t>(comm->rank)].first};
  from.get(name), to.get(name);
  launch(name, stream, comm, {count, dtype, op, -1},
         [=] { comm->reduce_scatter(pieces(from.later(name), out), to.later(name), dtype, op); });
}

void reduce_all(const char* name, Handle handle, Handle stream, const void* send,
                const void* receive, size_t count, int dtype, int op, int root) {
  const auto comm = find(handle);
  check_reduction(dtype, op, generation());
  const size_t bytes = bytes_of(count, dtype);
  const Buffer from{send, bytes}, to{receive, root < 0 || root == comm->rank ? bytes : 0};
  from.get(name), to.get(name);
  launch(name, stream, comm, {static_cast<int64_t>(count), dtype, op, root},
         [=] { comm->all_reduce(from.later(name), to.later(name), count, dtype, op, root); });
}

}  // namespace
}  // namespace softnpu::hccl

using namespace softnpu;
using namespace softnpu::hccl;

SOFTNPU_C int HcclAllReduce(void* send, void* receive, uint64_t count, int dtype, int op,
                            Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded(
      [&] { reduce_all("HcclAllReduce", comm, stream, send, receive, count, dtype, op, -1); });
}

SOFTNPU_C int HcclReduce(void* send, void* receive, uint64_t count, int dtype, int op,
                         uint32_t root, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    reduce_all("HcclReduce", comm, stream, send, receive, count, dtype, op,
               known_rank(root, *find(comm), "root"));
  });
}

SOFTNPU_C int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t root, Handle handle,
                            Handle stream) {
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

SOFTNPU_C int HcclAllGather(void* send, void* receive, uint64_t count, int dtype, Handle comm,
                            Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t bytes = bytes_of(count, dtype);
    gather_all("HcclAllGather", comm, stream, send, bytes, receive,
               even(bytes, static_cast<size_t>(find(comm)->ranks)), dtype);
  });
}

SOFTNPU_C int HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts,
                             const void* displacements, int dtype, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const size_t width = element_size(dtype);
    gather_all("HcclAllGatherV", comm, stream, send, count * width, receive,
               uneven(counts, displacements, static_cast<size_t>(find(comm)->ranks), width), dtype);
  });
}

SOFTNPU_C int HcclReduceScatter(void* send, void* receive, uint64_t count, int dtype, int op,
                                Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    check_reduction(dtype, op, generation());
    scatter_reduced("HcclReduceScatter", handle, stream, send,
                    even(bytes_of(count, dtype), static_cast<size_t>(find(handle)->ranks)), receive,
                    static_cast<int64_t>(count), dtype, op);
  });
}

SOFTNPU_C int HcclReduceScatterV(void* send, const void* counts, const void* displacements,
                                 void* receive, uint64_t count, int dtype, int op, Handle handle,
                                 Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    check_reduction(dtype, op, generation(), true);
    const auto comm = find(handle);
    const Counts out =
        uneven(counts, displacements, static_cast<size_t>(comm->ranks), element_size(dtype));
    if (out[static_cast<size_t>(comm->rank)].first != bytes_of(count, dtype))
      throw Fault(kParameter, "softnpu: HcclReduceScatterV: recvCount " + std::to_string(count) +
                                  " is not sendCounts[" + std::to_string(comm->rank) + "]");
    scatter_reduced("HcclReduceScatterV", handle, stream, send, out, receive, -1, dtype, op);
  });
}

SOFTNPU_C int HcclAlltoAll(const void* send, uint64_t send_count, int send_type,
                           const void* receive, uint64_t count, int type, Handle comm,
                           Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto ranks = static_cast<size_t>(find(comm)->ranks);
    all_to_all("HcclAlltoAll", comm, stream, send, even(bytes_of(send_count, send_type), ranks),
               receive, even(bytes_of(count, type), ranks), type);
  });
}

SOFTNPU_C int HcclAlltoAllV(const void* send, const void* send_counts, const void* send_at,
                            int send_type, const void* receive, const void* counts, const void* at,
                            int type, Handle comm, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {  // the counts are host arrays that need not live longer than this call
    const auto ranks = static_cast<size_t>(find(comm)->ranks);
    all_to_all("HcclAlltoAllV", comm, stream, send,
               uneven(send_counts, send_at, ranks, element_size(send_type)), receive,
               uneven(counts, at, ranks, element_size(type)), type);
  });
}

SOFTNPU_C int HcclAlltoAllVC(const void* send, const void* matrix, int send_type,
                             const void* receive, int type, Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto comm = find(handle);
    const auto ranks = static_cast<size_t>(comm->ranks), rank = static_cast<size_t>(comm->rank);
    const auto* const counts =
        static_cast<const uint64_t*>(matrix);  // row i: what rank i sends, one behind the other
    all_to_all("HcclAlltoAllVC", handle, stream, send,
               packed(counts + rank * ranks, 1, ranks, element_size(send_type)), receive,
               packed(counts + rank, ranks, ranks, element_size(type)), type);
  });
}

SOFTNPU_C int HcclScatter(void* send, void* receive, uint64_t count, int dtype, uint32_t root,
                          Handle handle, Handle stream) {
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
