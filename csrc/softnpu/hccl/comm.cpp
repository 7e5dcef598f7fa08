#include "comm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "reduce.h"
#include "softnpu/acl/report.h"

namespace softnpu {
namespace {

constexpr int kRemoteError = 507899;  // a peer is gone; unconfirmed number
constexpr int kJoinSeconds = 120;

// A process that has ended but was not waited for yet is as gone as one that does not exist.
bool running(int pid) {
  if (kill(pid, 0) != 0 && errno == ESRCH) return false;
  char path[64], text[512] = {};
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "r");
  if (!file) return false;
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  const char* end = length ? std::strrchr(text, ')') : nullptr;
  return end && end[1] == ' ' && end[2] != 'Z' && end[2] != 'X';
}

}  // namespace

Comm::Comm(std::string segment_name, int rank_count, int own_rank)
    : name(std::move(segment_name)), ranks(rank_count), rank(own_rank) {
  if (ranks < 1 || ranks > kMaxRanks || rank < 0 || rank >= ranks)
    throw Fault(kParameter, "softnpu: rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " (at most " +
                                std::to_string(kMaxRanks) + ")");
  const size_t pairs = static_cast<size_t>(ranks) * static_cast<size_t>(ranks);
  size_ = sizeof(Segment) + static_cast<size_t>(ranks) * kSlot + pairs * sizeof(Mailbox);
  const int file = shm_open(("/" + name).c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size_)) != 0)
    throw Fault(kNnRuntime, "softnpu: shared memory " + name + ": " + std::strerror(errno));
  void* start = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (start == MAP_FAILED) throw Fault(kNnRuntime, "softnpu: shared memory " + name + ": " + std::strerror(errno));
  segment_ = static_cast<Segment*>(start);
  boxes_ = reinterpret_cast<Mailbox*>(segment_ + 1);
  slots_ = reinterpret_cast<unsigned char*>(boxes_ + pairs);
  for (int peer = 0; peer < ranks; ++peer) everyone_.push_back(peer);
  segment_->pids[rank] = getpid();
  try {
    join();
  } catch (const Fault&) {
    munmap(segment_, size_);
    shm_unlink(("/" + name).c_str());
    throw;
  }
  if (rank == 0) shm_unlink(("/" + name).c_str());  // all have it open: nothing is left behind
}

// Waits for the others; the name tells which process made the root info.
void Comm::join() {
  const char* wanted = std::getenv("HCCL_CONNECT_TIMEOUT");
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(wanted ? std::atoi(wanted) : kJoinSeconds);
  int root = 0;
  std::sscanf(name.c_str(), "softnpu-%d-", &root);
  for (;;) {
    std::string missing;
    std::vector<int> joined;
    for (int peer = 0; peer < ranks; ++peer) {
      if (segment_->pids[peer])
        joined.push_back(peer);
      else
        missing += " " + std::to_string(peer);
    }
    if (missing.empty()) break;
    if (const int peer = gone(joined); peer >= 0)
      throw Fault(kRemoteError,
                  "softnpu: rank " + std::to_string(peer) + " is gone; missing in " + name + ":" + missing);
    if (root && !running(root))
      throw Fault(kRemoteError,
                  "softnpu: the process that made the root info " + name + " is gone; missing:" + missing);
    if (std::chrono::steady_clock::now() > limit)
      throw Fault(kTimeout, "softnpu: not joined " + name + " (HCCL_CONNECT_TIMEOUT): rank" + missing);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  barrier();
}

Comm::~Comm() { munmap(segment_, size_); }

int Comm::gone(const std::vector<int>& peers) const {
  for (const int peer : peers)
    if (!running(segment_->pids[peer])) return peer;
  return -1;
}

void Comm::fail_all(const std::string& why) {
  error = kRemoteError;
  int32_t nobody = 0;
  if (!segment_->failing.compare_exchange_strong(nobody, rank + 1)) return;
  std::snprintf(segment_->failure, sizeof segment_->failure, "%s", why.c_str());
  segment_->failed.store(rank + 1, std::memory_order_release);
}

void Comm::check_failed() {
  const int32_t by = segment_->failed.load(std::memory_order_acquire);
  if (!by) return;
  error = kRemoteError;
  throw Fault(kRemoteError,
              "softnpu: communicator " + name + " failed on rank " + std::to_string(by - 1) + ": " + segment_->failure);
}

template <class Ready>
void Comm::wait(const std::vector<int>& peers, Ready ready) {
  for (int turn = 0; !ready(); ++turn) {
    if (turn < 64)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(turn < 256 ? 20 : 200));
    check_failed();
    if (turn % 1024 != 1023) continue;
    const int peer = gone(peers);
    if (peer >= 0 && !ready())
      throw Fault(kRemoteError, "softnpu: rank " + std::to_string(peer) + " (process " +
                                    std::to_string(segment_->pids[peer]) + ") of communicator " + name + " is gone");
  }
}

void Comm::agree(const Agreement& mine) {
  check_failed();
  Agreement* const calls = segment_->calls[collectives_++ % 2];
  calls[rank] = mine;
  barrier();
  for (int peer = 0; peer < ranks; ++peer) {
    const Agreement& other = calls[peer];
    if (std::memcmp(&other, &mine, sizeof mine) == 0) continue;
    const auto differ = [&](const char* what, const std::string& theirs, const std::string& ours) {
      if (theirs == ours) return;
      throw Fault(kParameter, std::string("softnpu: ranks disagree on ") + what + ": rank " + std::to_string(peer) +
                                  " says " + theirs + ", rank " + std::to_string(rank) + " " + ours);
    };
    differ("the call", other.call, mine.call);
    differ("count", std::to_string(other.count), std::to_string(mine.count));
    differ("dtype", std::to_string(other.dtype), std::to_string(mine.dtype));
    differ("reduction", std::to_string(other.operation), std::to_string(mine.operation));
    differ("root", std::to_string(other.root), std::to_string(mine.root));
  }
}

void Comm::barrier() {
  const uint64_t round = segment_->rounds[rank].fetch_add(1) + 1;
  for (int peer = 0; peer < ranks; ++peer)
    wait(everyone_, [&] { return segment_->rounds[peer].load(std::memory_order_acquire) >= round; });
}

void Comm::all_reduce(const void* send, void* receive, size_t count, int dtype, int operation, int root) {
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
  for (int peer = 0; peer < ranks; ++peer) segment_->counts[rank][peer] = send[static_cast<size_t>(peer)].bytes;
  barrier();
  size_t largest = 0;
  for (int from = 0; from < ranks; ++from) {
    if (segment_->counts[from][rank] != receive[static_cast<size_t>(from)].bytes)
      throw Fault(kParameter, "softnpu: all-to-all: rank " + std::to_string(from) + " sends " +
                                  std::to_string(segment_->counts[from][rank]) + " bytes to rank " +
                                  std::to_string(rank) + ", which expects " +
                                  std::to_string(receive[static_cast<size_t>(from)].bytes));
    for (int to = 0; to < ranks; ++to) largest = std::max<size_t>(largest, segment_->counts[from][to]);
  }
  const size_t step = kSlot / static_cast<size_t>(ranks);
  for (size_t at = 0; at < largest; at += step) {
    const auto part = [&](const Piece& piece) { return at < piece.bytes ? std::min(step, piece.bytes - at) : 0; };
    for (size_t peer = 0; peer < send.size(); ++peer) {
      if (part(send[peer])) std::memcpy(slot(rank) + peer * step, send[peer].data + at, part(send[peer]));
    }
    barrier();
    for (size_t peer = 0; peer < receive.size(); ++peer) {
      if (part(receive[peer]))
        std::memcpy(receive[peer].data + at, slot(static_cast<int>(peer)) + static_cast<size_t>(rank) * step,
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

void Comm::reduce_scatter(const void* send, void* receive, size_t count, int dtype, int operation) {
  const size_t width = element_size(dtype), step = kSlot / static_cast<size_t>(ranks) / width;
  const auto* from = static_cast<const unsigned char*>(send);
  for (size_t at = 0; at < count; at += step) {
    const size_t now = std::min(step, count - at);
    for (size_t peer = 0; peer < static_cast<size_t>(ranks); ++peer)
      std::memcpy(slot(rank) + peer * step * width, from + (peer * count + at) * width, now * width);
    barrier();
    std::vector<const unsigned char*> parts;
    for (int peer = 0; peer < ranks; ++peer) parts.push_back(slot(peer) + static_cast<size_t>(rank) * step * width);
    reduce(parts, static_cast<unsigned char*>(receive) + at * width, now, dtype, operation);
    barrier();
  }
}

bool Comm::progress(Transfer& t) {
  Mailbox& mailbox = t.send ? box(rank, t.peer) : box(t.peer, rank);
  const bool full =
      mailbox.produced.load(std::memory_order_acquire) != mailbox.consumed.load(std::memory_order_acquire);
  if (full == t.send) return false;
  if (t.done == 0 && t.send) mailbox.length = t.bytes;
  if (t.done == 0 && mailbox.length != t.bytes)
    throw Fault(kParameter, "softnpu: rank " + std::to_string(t.peer) + " sends " + std::to_string(mailbox.length) +
                                " bytes to rank " + std::to_string(rank) + ", which expects " +
                                std::to_string(t.bytes));
  const size_t now = std::min(kBox, t.bytes - t.done);
  if (t.send)
    std::memcpy(mailbox.data, t.data + t.done, now);
  else
    std::memcpy(t.data + t.done, mailbox.data, now);
  (t.send ? mailbox.produced : mailbox.consumed).fetch_add(1, std::memory_order_release);
  t.done += now;
  return true;
}

void Comm::transfer(std::vector<Transfer> transfers) {
  std::erase_if(transfers, [](const Transfer& t) { return t.bytes == 0; });
  while (!transfers.empty()) {
    bool moved = false;
    std::vector<int> peers;
    for (const Transfer& t : transfers) peers.push_back(t.peer);
    wait(peers, [&] {
      // Two transfers of one direction with one peer keep their order: only the first may move.
      for (size_t i = 0; i < transfers.size(); ++i) {
        const auto same = [&](const Transfer& other) {
          return other.peer == transfers[i].peer && other.send == transfers[i].send;
        };
        if (std::find_if(transfers.begin(), transfers.begin() + static_cast<std::ptrdiff_t>(i), same) ==
            transfers.begin() + static_cast<std::ptrdiff_t>(i))
          moved |= progress(transfers[i]);
      }
      return moved;
    });
    std::erase_if(transfers, [](const Transfer& t) { return t.done == t.bytes; });
  }
}

}  // namespace softnpu
