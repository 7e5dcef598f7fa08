// A communicator's ranks as threads over one mapping, so that ThreadSanitizer sees all of its
// shared memory, and as processes. Argument "race": a planted race instead.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "softnpu/acl/report.h"
#include "softnpu/hccl/comm.h"
#include "softnpu/hccl/types.h"

using namespace softnpu;
using namespace softnpu::hccl;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                       \
    }                                                                      \
  } while (0)

namespace {

using Data = std::vector<int32_t>;

std::string fresh_name() {
  static std::atomic<int> number{0};
  return "softnpu-" + std::to_string(getpid()) + "-test-" + std::to_string(number++);
}

std::shared_ptr<Segment> fresh(int ranks) { return std::make_shared<Segment>(fresh_name(), ranks); }

void together(int ranks, const std::function<void(Comm&)>& run) {
  const auto segment = fresh(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      Comm comm(segment, rank);
      run(comm);
    });
  for (auto& thread : threads) thread.join();
}

// What is wrong, as the stream's worker learns it: the others are told.
std::string fault_of(Comm& comm, const std::function<void()>& run) {
  try {
    run();
  } catch (const Fault& fault) {
    comm.fail_all(fault.what());
    return fault.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

unsigned char* bytes(Data& data) { return reinterpret_cast<unsigned char*>(data.data()); }

Agreement said(const char* call, int64_t count) {
  Agreement result{{}, count, kHcclInt32, kHcclSum, -1};
  std::snprintf(result.call, sizeof result.call, "%s", call);
  return result;
}

void collectives(Comm& comm) {
  const size_t ranks = static_cast<size_t>(comm.ranks), rank = static_cast<size_t>(comm.rank);
  for (const size_t count : {size_t{1}, 2 * kSlot / 4 + 3}) {  // one round, and three
    Data mine(count), result(count), part(count);
    std::iota(mine.begin(), mine.end(), comm.rank);
    comm.collective(said("reduce", static_cast<int64_t>(count)), [&] {
      comm.all_reduce(mine.data(), result.data(), count, kHcclInt32, kHcclSum, -1);
    });
    const auto sum = [&](size_t at) {
      return static_cast<int32_t>(ranks * at + ranks * (ranks - 1) / 2);
    };
    CHECK(result[0] == sum(0) && result.back() == sum(count - 1));
    comm.broadcast(mine.data(), count * 4, 1);
    CHECK(mine[0] == 1 && mine.back() == static_cast<int32_t>(count));
    Data all(count * ranks, comm.rank);
    std::vector<Piece> parts;  // one value less for each later rank
    for (size_t peer = 0; peer < ranks; ++peer)
      parts.push_back({bytes(all) + 4 * peer * count, 4 * (count - std::min(peer, count))});
    comm.reduce_scatter(parts, part.data(), kHcclInt32, kHcclMax);
    for (size_t i = 0; i < count; ++i) CHECK(part[i] == (i + rank < count ? comm.ranks - 1 : 0));
  }
  Data send(ranks * ranks), receive(ranks * ranks);  // j values to rank j, rank + 1 values of each
  std::vector<Piece> out, in;
  for (size_t peer = 0, at = 0; peer < ranks; at += ++peer) {
    for (size_t i = 0; i <= peer; ++i) send[at + i] = static_cast<int32_t>(100 * rank + peer);
    out.push_back({bytes(send) + 4 * at, 4 * (peer + 1)});
    in.push_back({bytes(receive) + 4 * peer * (rank + 1), 4 * (rank + 1)});
  }
  comm.exchange(out, in);
  for (size_t peer = 0; peer < ranks; ++peer)
    CHECK(receive[peer * (rank + 1) + rank] == static_cast<int32_t>(100 * peer + rank));
}

void messages(Comm& comm) {
  const int after = (comm.rank + 1) % comm.ranks,
            before = (comm.rank + comm.ranks - 1) % comm.ranks;
  for (int round = 0; round < 20; ++round) {
    const size_t count = round ? 5 : kBox / 2;  // two pieces at first
    Data one(count, comm.rank + round), two(3, 7), first(count), second(3);
    comm.transfer({{true, bytes(one), 4 * count, after},
                   {true, bytes(two), 12, after},
                   {false, bytes(first), 4 * count, before},
                   {false, bytes(second), 12, before}});
    CHECK(first[0] == before + round && first.back() == before + round && second[2] == 7);
  }
}

// A send ends when its receiver has taken it, also where the bytes would fit on the way.
void sends_wait() {
  std::atomic<bool> sent{false};
  together(2, [&](Comm& comm) {
    Data data(1, comm.rank);
    if (comm.rank == 0) {
      comm.transfer({{true, bytes(data), 4, 1}});
      sent = true;
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!sent);
    comm.transfer({{false, bytes(data), 4, 0}});
    CHECK(data[0] == 0);
  });
  CHECK(sent);
}

void mismatches_reach_everyone() {
  together(2, [](Comm& comm) {
    Data data(4);
    const std::string why = fault_of(comm, [&] {
      comm.transfer(
          {{comm.rank == 0, bytes(data), comm.rank == 0 ? size_t{16} : size_t{8}, 1 - comm.rank}});
    });
    CHECK(has(why, "rank 0 sends 16 bytes to rank 1, which expects 8"));
  });
  const Agreement alike = said("reduce", 4);
  std::vector<std::pair<std::string, Agreement>> others(5, {"", alike});
  others[0].first = "the call", others[0].second = said("other", 4);
  others[1].first = "count", others[1].second.count = 5;
  others[2].first = "dtype", others[2].second.dtype = kHcclFp32;
  others[3].first = "reduction", others[3].second.operation = kHcclMax;
  others[4].first = "root", others[4].second.root = 1;
  for (const auto& [what, other] : others)
    together(3, [&, what = "ranks disagree on " + what](Comm& comm) {
      const auto call = [&] { comm.collective(comm.rank == 2 ? other : alike, [] {}); };
      CHECK(has(fault_of(comm, call), what) && has(fault_of(comm, call), what) &&
            comm.error);  // now and later
    });
  together(2, [](Comm& comm) {
    Data data(4);
    const size_t expected = comm.rank ? 8 : 4;
    const std::vector<Piece> out(2, {bytes(data), 8}), in(2, {bytes(data), expected});
    CHECK(has(fault_of(comm, [&] { comm.exchange(out, in); }),
              "sends 8 bytes to rank 0, which expects 4"));
  });
  together(2, [](Comm& comm) {
    Data data(4), result(4);
    const std::vector<Piece> out(2, {bytes(data), comm.rank ? size_t{8} : size_t{4}});
    const std::string why =
        fault_of(comm, [&] { comm.reduce_scatter(out, result.data(), kHcclInt32, kHcclSum); });
    CHECK(has(why, "reduce-scatter: rank ") && has(why, " bytes for rank 0, rank "));
  });
}

void who_has_left_receives_nothing() {
  together(2, [](Comm& comm) {
    Data data(4);
    if (comm.rank == 1) return;
    const std::string why = fault_of(comm, [&] { comm.transfer({{true, bytes(data), 16, 1}}); });
    CHECK(has(why, "rank 1 (process ") && has(why, "has left") &&
          has(why, "a message of 16 bytes from rank 0 to rank 1"));
    CHECK(has(statistics("{}"), "\"unreceived\":{\"a message of 16 bytes from rank 0 to rank 1"));
  });
}

void root_infos_are_used_once() {
  const auto refusal = [](const std::function<void()>& run) {
    try {
      run();
    } catch (const Fault& fault) {
      return std::string(fault.what());
    }
    return std::string();
  };
  const auto segment = fresh(2);
  std::thread other([&] {
    Comm comm(segment, 1);
    CHECK(has(refusal([&] { Comm again(segment, 1); }),
              "rank 1 of " + segment->name + " is taken by process"));
    CHECK(has(refusal([&] { Segment three(segment->name + "x", 3), two(segment->name + "x", 2); }),
              "2 ranks here and 3"));
  });
  Comm comm(segment, 0);
  other.join();
  shm_unlink(("/" + segment->name + "x").c_str());
  CHECK(has(refusal([&] { Segment none(fresh_name(), 0); }), "0 ranks"));
  const auto one = fresh(1);
  CHECK(has(refusal([&] { Comm none(one, 1); }), "rank 1 of 1"));
  one->unlink();
}

pid_t child(const std::function<void()>& run) {
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid) return pid;
  run();
  std::exit(0);  // with what the library does at a normal end
}

int ended(pid_t pid) {
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  return status;
}

// Rank 1 of `first` ends; meanwhile `second` is formed without it by a rank that comes late.
void ending(bool lost) {
  const auto first = fresh(2), second = fresh(2);
  const pid_t late = lost ? 0 : child([&] {
    std::this_thread::sleep_for(std::chrono::seconds(7));
    Comm comm(second, 1);
  });
  const pid_t ends = child([&] {
    new Comm(first, 1);  // never destroyed: the end of the process has to leave
    if (lost) raise(SIGKILL);
  });
  Comm comm(first, 0);
  CHECK(WIFSIGNALED(ended(ends)) == lost);
  CHECK(ended(child([] {})) == 0);  // a forked child's end is not the end of this rank
  CHECK(!first->header().left[0] && first->header().left[1] == !lost);
  std::string why;
  try {
    Comm late_comm(second, 0);
  } catch (const Fault& fault) {
    why = fault.what();
  }
  CHECK(lost ? has(why, "rank 1 (process " + std::to_string(ends) + ") of communicator " +
                            first->name + " is gone")
             : why.empty());
  if (late) CHECK(ended(late) == 0);
}

void left_over() {
  const std::string name = fresh_name();
  const pid_t dead = child([&] {
    const auto segment = std::make_shared<Segment>(name, 2);
    std::thread([segment] {
      while (!segment->header().pids[0]) std::this_thread::yield();
      std::_Exit(3);
    }).detach();
    Comm comm(segment, 0);
  });
  CHECK(WEXITSTATUS(ended(dead)) == 3);
  std::string why;
  try {
    Comm comm(std::make_shared<Segment>(name, 2), 0);
  } catch (const Fault& fault) {
    why = fault.what();
  }
  CHECK(has(why, name + " was left over by process " + std::to_string(dead)));
  CHECK(shm_unlink(("/" + name).c_str()) != 0);  // and it is cleaned up
}

void reductions() {
  const auto refused = [](int dtype, int operation, Generation chip, bool uneven = false) {
    try {
      check_reduction(dtype, operation, chip, uneven);
    } catch (const Fault& fault) {
      return fault.code == kFeature;
    }
    return false;
  };
  for (const Generation chip : {Generation::kA2, Generation::kA3, Generation::kA5}) {
    const bool a5 = chip == Generation::kA5;
    for (const int dtype : {kHcclInt8, kHcclInt32, kHcclInt64, kHcclFp16, kHcclFp32})
      CHECK(!refused(dtype, kHcclSum, chip) && !refused(dtype, kHcclProd, chip) &&
            !refused(dtype, kHcclMin, chip));
    for (const int dtype : {kHcclInt16, kHcclBfp16})
      CHECK(!refused(dtype, kHcclMax, chip) && refused(dtype, kHcclProd, chip));
    CHECK(!refused(kHcclBfp16, kHcclSum, chip, true) &&
          refused(kHcclFp32, kHcclProd, chip, true) == !a5);
    CHECK(refused(kHcclInt64, kHcclSum, chip, true) == (chip == Generation::kA2));
    for (const int dtype : {kHcclFp64, kHcclUint64}) CHECK(refused(dtype, kHcclSum, chip, true));
    for (const int dtype : {kHcclFp64, kHcclUint64}) CHECK(refused(dtype, kHcclSum, chip) == !a5);
    for (const int dtype : {kHcclUint8, kHcclUint16, kHcclUint32, kHcclHif8, kHcclFp8E4M3,
                            kHcclFp8E5M2, kHcclFp8E8M0})
      CHECK(refused(dtype, kHcclSum, chip) && element_size(dtype) >= 1);
  }
}

// A read of another rank's slot without a barrier. The relaxed flags hold both together without
// ordering them.
void planted_race() {
  std::atomic<bool> written{false}, read{false};
  const auto segment = fresh(2);
  segment->unlink();
  std::thread writer([&] {
    segment->slot(0)[0] = 1;
    written.store(true, std::memory_order_relaxed);
    while (!read.load(std::memory_order_relaxed)) std::this_thread::yield();
  });
  while (!written.load(std::memory_order_relaxed)) std::this_thread::yield();
  std::printf("race ran: %d\n", segment->slot(0)[0]);
  read.store(true, std::memory_order_relaxed);
  writer.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "race") {
    planted_race();
    return 0;
  }
  const pid_t lost = child([] { ending(true); }),
              left = child([] { ending(false); });  // they wait for seconds
  for (const int ranks : {2, 3}) {
    together(ranks, collectives);
    together(ranks, messages);
  }
  sends_wait();
  mismatches_reach_everyone();
  who_has_left_receives_nothing();
  root_infos_are_used_once();
  reductions();
  left_over();
  CHECK(ended(lost) == 0 && ended(left) == 0);
  std::puts("collectives good");
}
