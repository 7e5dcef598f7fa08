#include "comm.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "reduce.h"
#include "registry.h"
#include "softnpu/acl/number.h"
#include "softnpu/acl/report.h"

namespace softnpu::hccl {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRemoteError = 507899;  // a peer is gone; unconfirmed number
constexpr int kConnectSeconds = 120;
constexpr int kExecSeconds = 1836;  // documents of HCCL_EXEC_TIMEOUT; 0: never
constexpr int kLostSeconds =
    5;  // our choice: ranks that go on without a lost one may still form groups

int seconds(const char* variable, int otherwise) {
  const char* const text = std::getenv(variable);
  int value = 0;
  return text && number(text, &value) && value >= 0 ? value : otherwise;
}

bool since(Clock::time_point start, int limit) {
  return Clock::now() - start > std::chrono::seconds(limit);
}

}  // namespace

Comm::Comm(const std::shared_ptr<Segment>& segment, int own_rank)
    : name(segment->name),
      ranks(segment->ranks),
      rank(own_rank),
      segment_(segment),
      header_(segment->header()) {
  if (rank < 0 || rank >= ranks)
    throw Fault(kParameter,
                "softnpu: rank " + std::to_string(rank) + " of " + std::to_string(ranks));
  for (int peer = 0; peer < ranks; ++peer) everyone_.push_back(peer);
  take_rank();
  try {
    join();
  } catch (const Fault&) {
    leave();
    segment_->unlink();
    throw;
  }
  register_comm(this);
}

Comm::~Comm() {
  forget_comm(this);
  leave();
}

// A root info serves one communicator: a second process of one rank would write into the first
// one's memory.
void Comm::take_rank() {
  int32_t owner = 0;
  if (header_.pids[rank].compare_exchange_strong(owner, getpid())) return;
  const std::string process = "process " + std::to_string(owner);
  if (!running(owner)) {
    segment_->unlink();
    throw Fault(kParameter, "softnpu: " + name + " was left over by " + process +
                                ", which is gone: a new communicator needs a new root info");
  }
  throw Fault(kParameter,
              "softnpu: rank " + std::to_string(rank) + " of " + name + " is taken by " + process +
                  ": every rank joins once, and a new communicator needs a new root info");
}

// Waits for the others; the name tells which process made the root info.
void Comm::join() {
  const auto start = Clock::now();
  const int limit = seconds("HCCL_CONNECT_TIMEOUT", kConnectSeconds);
  int root = 0;
  std::sscanf(name.c_str(), "softnpu-%d-", &root);
  for (int turn = 0;; ++turn) {
    std::string missing, gone;
    for (int peer = 0; peer < ranks; ++peer) {
      if (!header_.pids[peer])
        missing += " " + std::to_string(peer);
      else if (gone.empty() && turn % 64 == 0)
        gone = segment_->absence(peer);
    }
    if (missing.empty()) break;
    const std::string here = "; not joined " + name + ": rank" + missing;
    if (turn % 64 == 0) {
      if (gone.empty() && since(start, kLostSeconds)) gone = lost_anywhere();
      if (!gone.empty()) throw Fault(kRemoteError, "softnpu: " + gone + here);
      if (root && !running(root))
        throw Fault(kRemoteError, "softnpu: process " + std::to_string(root) +
                                      ", which made the root info, is gone" + here);
    }
    if (since(start, limit))
      throw Fault(kTimeout,
                  "softnpu: waited " + std::to_string(limit) + " s (HCCL_CONNECT_TIMEOUT)" + here);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (rank == 0) segment_->unlink();  // all have it open; before anyone can reuse the name
  barrier();
}

std::string Comm::lost_peer() const {
  for (int peer = 0; peer < ranks; ++peer)
    if (segment_->lost(peer)) return segment_->absence(peer);
  return "";
}

void Comm::leave() {
  if (header_.pids[rank] == getpid()) header_.left[rank] = true;
}

void Comm::fail_all(const std::string& why) {
  error = kRemoteError;
  int32_t nobody = 0;
  if (!header_.failing.compare_exchange_strong(nobody, rank + 1)) return;
  std::snprintf(header_.failure, sizeof header_.failure, "%s", why.c_str());
  header_.failed.store(rank + 1, std::memory_order_release);
}

void Comm::check_failed() {
  const int32_t by = header_.failed.load(std::memory_order_acquire);
  if (!by) return;
  error = kRemoteError;
  throw Fault(kRemoteError, "softnpu: communicator " + name + " failed on rank " +
                                std::to_string(by - 1) + ": " + header_.failure);
}

void Comm::wait(const std::vector<int>& peers, const std::function<bool()>& ready,
                const std::function<std::string()>& what) {
  const auto start = Clock::now();
  for (int turn = 0; !ready(); ++turn) {
    if (turn < 64)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(turn < 256 ? 20 : 200));
    check_failed();
    if (turn % 1024 != 1023) continue;
    for (const int peer : peers) {
      const std::string why = segment_->absence(peer);
      if (why.empty()) continue;
      if (ready()) return;  // and no second look: it would find a message taken now gone
      throw Fault(kRemoteError, "softnpu: " + why + "; waiting for " + what());
    }
    static const int limit = seconds("HCCL_EXEC_TIMEOUT", kExecSeconds);
    if (limit && since(start, limit))
      throw Fault(kTimeout, "softnpu: waited " + std::to_string(limit) +
                                " s (HCCL_EXEC_TIMEOUT) for " + what());
  }
}

void Comm::barrier() {
  const uint64_t round = header_.rounds[rank].fetch_add(1) + 1;
  for (int peer = 0; peer < ranks; ++peer)
    wait(
        everyone_, [&] { return header_.rounds[peer].load(std::memory_order_acquire) >= round; },
        [&] { return "rank " + std::to_string(peer) + " of communicator " + name; });
}

void Comm::collective(const Agreement& mine, const std::function<void()>& run) {
  std::lock_guard lock(collective_mutex_);
  agree(mine);
  run();
}

void Comm::agree(const Agreement& mine) {
  check_failed();
  Agreement* const calls = header_.calls[collectives_++ % 2];
  calls[rank] = mine;
  barrier();
  for (int peer = 0; peer < ranks; ++peer) {
    const Agreement& other = calls[peer];
    if (std::memcmp(&other, &mine, sizeof mine) == 0) continue;
    const auto differ = [&](const char* what, const std::string& theirs, const std::string& ours) {
      if (theirs == ours) return;
      throw Fault(kParameter, std::string("softnpu: ranks disagree on ") + what + ": rank " +
                                  std::to_string(peer) + " says " + theirs + ", rank " +
                                  std::to_string(rank) + " " + ours);
    };
    differ("the call", other.call, mine.call);
    differ("count", std::to_string(other.count), std::to_string(mine.count));
    differ("dtype", std::to_string(other.dtype), std::to_string(mine.dtype));
    differ("reduction", std::to_string(other.operation), std::to_string(mine.operation));
    differ("root", std::to_string(other.root), std::to_string(mine.root));
  }
}

void Comm::all_reduce(const void* send, void* receive, size_t count, int dtype, int operation,
                      int root) {
  const size_t width = element_size(dtype), step = kSlot / width;
  for (size_t at = 0; at < count; at += step) {
    const size_t now = std::min(step, count - at);
    std::memcpy(slot(rank), static_cast<const unsigned char*>(send) + at * width, now * width);
    barrier();
    if (root < 0 || root == rank) {
      std::vector<const unsigned char*> parts;
      for (int peer = 0; peer < ranks; ++peer) parts.push_back(slot(peer));
      reduce(parts, static_cast<unsigned char*>(receive) + at * width, now, dtype, operation);
    }
    barrier();
  }
}

void Comm::broadcast(void* data, size_t bytes, int root) {
  auto* local = static_cast<unsigned char*>(data);
  for (size_t at = 0; at < bytes; at += kSlot) {
    const size_t now = std::min(kSlot, bytes - at);
    if (rank == root) std::memcpy(slot(root), local + at, now);
    barrier();
    if (rank != root) std::memcpy(local + at, slot(root), now);
    barrier();
  }
}

void Comm::exchange(const std::vector<Piece>& send, const std::vector<Piece>& receive) {
  for (int peer = 0; peer < ranks; ++peer)
    header_.counts[rank][peer] = send[static_cast<size_t>(peer)].bytes;
  barrier();
  size_t largest = 0;
  for (int from = 0; from < ranks; ++from) {
    if (header_.counts[from][rank] != receive[static_cast<size_t>(from)].bytes)
      throw Fault(kParameter, "softnpu: all-to-all: rank " + std::to_string(from) + " sends " +
                                  std::to_string(header_.counts[from][rank]) + " bytes to rank " +
                                  std::to_string(rank) + ", which expects " +
                                  std::to_string(receive[static_cast<size_t>(from)].bytes));
    for (int to = 0; to < ranks; ++to)
      largest = std::max<size_t>(largest, header_.counts[from][to]);
  }
  const size_t step = kSlot / static_cast<size_t>(ranks);
  for (size_t at = 0; at < largest; at += step) {
    const auto part = [&](const Piece& piece) {
      return at < piece.bytes ? std::min(step, piece.bytes - at) : 0;
    };
    for (size_t peer = 0; peer < send.size(); ++peer) {
      if (part(send[peer]))
        std::memcpy(slot(rank) + peer * step, send[peer].data + at, part(send[peer]));
    }
    barrier();
    for (size_t peer = 0; peer < receive.size(); ++peer) {
      if (part(receive[peer]))
        std::memcpy(receive[peer].data + at,
                    slot(static_cast<int>(peer)) + static_cast<size_t>(rank) * step,
                    part(receive[peer]));
    }
    barrier();
  }
  barrier();
}

void Comm::all_gather(const void* send, size_t bytes, const std::vector<Piece>& receive) {
  auto* data = static_cast<unsigned char*>(const_cast<void*>(send));
  exchange(std::vector<Piece>(static_cast<size_t>(ranks), Piece{data, bytes}), receive);
}

void Comm::reduce_scatter(const std::vector<Piece>& send, void* receive, int dtype, int operation) {
  for (size_t peer = 0; peer < send.size(); ++peer) header_.counts[rank][peer] = send[peer].bytes;
  barrier();
  size_t largest = 0;
  for (int other = 0; other < ranks; ++other)
    for (size_t peer = 0; peer < send.size(); ++peer) {
      largest = std::max(largest, send[peer].bytes);
      if (header_.counts[other][peer] != send[peer].bytes)
        throw Fault(kParameter, "softnpu: reduce-scatter: rank " + std::to_string(other) + " has " +
                                    std::to_string(header_.counts[other][peer]) +
                                    " bytes for rank " + std::to_string(peer) + ", rank " +
                                    std::to_string(rank) + " has " +
                                    std::to_string(send[peer].bytes));
    }
  const size_t width = element_size(dtype), mine = static_cast<size_t>(rank);
  const size_t step = kSlot / static_cast<size_t>(ranks) / width * width;
  for (size_t at = 0; at < largest; at += step) {
    const auto part = [&](size_t peer) {
      return at < send[peer].bytes ? std::min(step, send[peer].bytes - at) : 0;
    };
    for (size_t peer = 0; peer < send.size(); ++peer)
      if (part(peer)) std::memcpy(slot(rank) + peer * step, send[peer].data + at, part(peer));
    barrier();
    std::vector<const unsigned char*> parts;
    for (int peer = 0; peer < ranks; ++peer) parts.push_back(slot(peer) + mine * step);
    if (part(mine))
      reduce(parts, static_cast<unsigned char*>(receive) + at, part(mine) / width, dtype,
             operation);
    barrier();
  }
  barrier();
}

}  // namespace softnpu::hccl
