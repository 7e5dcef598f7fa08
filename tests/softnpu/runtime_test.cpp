// The runtime's own tests, without torch: streams, events, memory, graphs from many threads at
// once. Built with ThreadSanitizer too; `runtime_test race` plants a data race (a missing event
// wait) that ThreadSanitizer must report.
#include "runtime_test.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "softnpu/acl/faults.h"
#include "softnpu/acl/memory.h"
#include "softnpu/acl/report.h"
#include "softnpu/acl/stream.h"

using softnpu::find_stream;

namespace {

void push(void* stream, std::function<void()> run) {
  find_stream(stream, 0)->push({"test", std::move(run)});
}

// Plain ints written on one stream and read on another: ThreadSanitizer sees whether events really
// order them.
void producer_and_consumer() {
  void *first, *second, *event;
  CHECK(!aclrtCreateStream(&first) && !aclrtCreateStream(&second) &&
        !aclrtCreateEventWithFlag(&event, 0));
  std::vector<int> data(64, 0);
  int wrong = 0;
  for (int round = 1; round <= 50; ++round) {
    push(first, [&data, round] {
      for (int& value : data) value = round;
    });
    CHECK(!aclrtRecordEvent(event, first));
    CHECK(!aclrtStreamWaitEvent(second, event));
    push(second, [&data, &wrong, round] {
      for (int value : data) wrong += value != round;
    });
    CHECK(!aclrtRecordEvent(event, second));
    CHECK(!aclrtStreamWaitEvent(first, event));
  }
  CHECK(!aclrtSynchronizeStream(first) && !aclrtSynchronizeStream(second));
  CHECK(wrong == 0);
  CHECK(!aclrtDestroyEvent(event) && !aclrtDestroyStream(first) && !aclrtDestroyStream(second));
  CHECK(aclrtDestroyStream(first) != 0);
}

// A missing wait. The relaxed flags hold both tasks together without ordering them, so the report
// does not depend on luck.
void planted_race() {
  void *first, *second;
  CHECK(!aclrtCreateStream(&first) && !aclrtCreateStream(&second));
  int data = 0, seen = 0;
  std::atomic<bool> written{false}, read{false};
  push(first, [&] {
    data = 1;
    written.store(true, std::memory_order_relaxed);
    while (!read.load(std::memory_order_relaxed)) std::this_thread::yield();
  });
  push(second, [&] {
    while (!written.load(std::memory_order_relaxed)) std::this_thread::yield();
    seen = data;
    read.store(true, std::memory_order_relaxed);
  });
  CHECK(!aclrtSynchronizeStream(first) && !aclrtSynchronizeStream(second));
  std::printf("race ran: %d\n", seen);
}

void memory_is_guarded() {
  void *a, *b;
  CHECK(!aclrtMalloc(&a, 100, 0) && !aclrtMalloc(&b, 100, 0));
  std::vector<unsigned char> host(100, 7), back(100);
  CHECK(!aclrtMemcpy(a, 100, host.data(), 100, 1) && !aclrtMemcpy(b, 100, a, 100, 3) &&
        !aclrtMemcpy(back.data(), 100, b, 100, 2));
  CHECK(back == host);
  CHECK(aclrtMemcpy(static_cast<char*>(a) + 1, 100, host.data(), 100, 1) != 0);  // one byte too far
  CHECK(aclrtMemcpy(a, 99, host.data(), 100, 1) != 0);
  CHECK(aclrtMemcpy(host.data(), 100, host.data(), 100, 1) !=
        0);  // a host pointer where the device should be
  auto* alias = static_cast<unsigned char*>(softnpu::resolve(a, 100, 0, "test").alias);
  alias[100] = 0;
  CHECK(softnpu::check_red_zones().find("over-written") != std::string::npos);
  CHECK(softnpu::check_red_zones().empty());  // reported once
  alias[100] = 0;
  CHECK(aclrtFree(a) == softnpu::kWriteOutOfBounds);
  CHECK(aclrtFree(a) != 0 &&
        aclrtMemcpy(back.data(), 100, a, 100, 2) != 0);  // freed twice, used after free
  CHECK(!aclrtFree(b));
}

void freed_between_launch_and_run() {
  void *stream, *a;
  CHECK(!aclrtCreateStream(&stream) && !aclrtMalloc(&a, 64, 0));
  std::atomic<bool> go{false};
  push(stream, [&go] {
    while (!go) std::this_thread::yield();
  });
  CHECK(!aclrtMemsetAsync(a, 64, 1, 64, stream));
  CHECK(aclrtSynchronizeStreamWithTimeout(stream, 5) == softnpu::kTimeout);
  CHECK(!aclrtFree(a));
  go = true;
  CHECK(aclrtSynchronizeStream(stream) != 0);
  CHECK(!aclrtSynchronizeStream(stream));  // reported once
  CHECK(!aclrtDestroyStream(stream));
}

void many_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      CHECK(!aclrtSetDevice(0));
      void* stream;
      CHECK(!aclrtCreateStream(&stream));
      for (int i = 0; i < 40; ++i) {
        void* p;
        int host = i, back = -1;
        CHECK(!aclrtMalloc(&p, sizeof host, 0));
        CHECK(!aclrtMemcpyAsync(p, sizeof host, &host, sizeof host, 1, stream));
        CHECK(!aclrtMemcpyAsync(&back, sizeof back, p, sizeof back, 2, stream));
        CHECK(!aclrtSynchronizeStream(stream) && back == i && !aclrtFree(p));
        softnpu::statistics("{}");
      }
      CHECK(!aclrtDestroyStream(stream));
    });
  }
  for (auto& thread : threads) thread.join();
}

void graphs() {
  void *main, *side, *event, *back, *graph;
  CHECK(!aclrtCreateStream(&main) && !aclrtCreateStream(&side) &&
        !aclrtCreateEventWithFlag(&event, 0) && !aclrtCreateEventWithFlag(&back, 0));
  int a = 0, b = 0, c = 0;
  for (const bool joined : {true, false}) {
    CHECK(!aclmdlRICaptureBegin(main, 0));
    push(main, [&] { a += 1; });
    CHECK(!aclrtRecordEvent(event, main) && !aclrtStreamWaitEvent(side, event));
    push(side, [&] { b = a * 10; });
    CHECK(!aclrtRecordEvent(back, side));
    if (joined) CHECK(!aclrtStreamWaitEvent(main, back));
    push(main, [&] { c = joined ? b + 1 : 0; });
    CHECK((aclmdlRICaptureEnd(main, &graph) == 0) == joined);
    if (!joined) break;
    for (const uint64_t seed :
         {0, 3, 4}) {  // with chaos in another order that the captured dependencies allow
      softnpu::set_chaos(seed);
      CHECK(!aclmdlRIExecuteAsync(graph, main) && !aclrtSynchronizeStream(main));
      CHECK(c == 10 * a + 1);
    }
    softnpu::set_chaos(0);
    CHECK(a == 3 && !aclmdlRIDestroy(graph));
  }
  // A refused synchronisation leaves the capture alive.
  CHECK(!aclmdlRICaptureBegin(main, 0) && aclrtSynchronizeStream(main) != 0 &&
        !aclmdlRICaptureEnd(main, &graph) && !aclmdlRIDestroy(graph));
  CHECK(!aclrtDestroyStream(main) && !aclrtDestroyStream(side) && !aclrtDestroyEvent(event) &&
        !aclrtDestroyEvent(back));
}

void faults() {
  std::string problem;
  CHECK(!softnpu::inject("aclrtMalloc:0:5", &problem) && !softnpu::inject("aclrtMalloc", &problem));
  CHECK(softnpu::inject("aclrtMalloc:2:207001,test@kernel:1:507015", &problem));
  void *a, *b, *stream;
  CHECK(!aclrtMalloc(&a, 8, 0) && aclrtMalloc(&b, 8, 0) == softnpu::kOutOfMemory &&
        !aclrtMalloc(&b, 8, 0));
  CHECK(!aclrtCreateStream(&stream));
  push(stream, [] {});
  CHECK(aclrtSynchronizeStream(stream) == softnpu::kKernelFault);
  CHECK(!aclrtFree(a) && !aclrtFree(b) && !aclrtDestroyStream(stream));
}

// A wait belongs to the record before it: a later record of the event on an idle stream must not
// release it.
void event_recorded_again() {
  void *slow, *idle, *waiting, *event;
  CHECK(!aclrtCreateStream(&slow) && !aclrtCreateStream(&idle) && !aclrtCreateStream(&waiting) &&
        !aclrtCreateEventWithFlag(&event, 0));
  int written = 0, seen = -1;
  push(slow, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    written = 1;
  });
  CHECK(!aclrtRecordEvent(event, slow) && !aclrtStreamWaitEvent(waiting, event) &&
        !aclrtRecordEvent(event, idle));
  push(waiting, [&] { seen = written; });
  CHECK(!aclrtSynchronizeEvent(event) && !aclrtSynchronizeStream(waiting) && seen == 1);
  CHECK(!aclrtDestroyStream(slow) && !aclrtDestroyStream(idle) && !aclrtDestroyStream(waiting) &&
        !aclrtDestroyEvent(event));
}

void fail_next(void* stream) {
  std::string problem;
  CHECK(softnpu::inject("test@kernel:1:507015", &problem));
  push(stream, [] {});
}

// A fault reaches whoever waits behind it, is reported once, and outlives its stream.
void faults_travel() {
  void *first, *second, *event;
  CHECK(!aclrtCreateStream(&first) && !aclrtCreateStream(&second) &&
        !aclrtCreateEventWithFlag(&event, 0));
  fail_next(first);
  CHECK(!aclrtRecordEvent(event, first) && !aclrtStreamWaitEvent(second, event));
  CHECK(aclrtSynchronizeStream(second) == softnpu::kKernelFault && !aclrtSynchronizeStream(first));
  fail_next(first);
  CHECK(!aclrtRecordEvent(event, first) && aclrtSynchronizeEvent(event) == softnpu::kKernelFault);
  CHECK(!aclrtSynchronizeEvent(event) && !aclrtSynchronizeDevice());
  fail_next(first);
  CHECK(!aclrtDestroyStream(first) && aclrtSynchronizeDevice() == softnpu::kKernelFault &&
        !aclrtSynchronizeDevice());
  CHECK(!aclrtDestroyStream(second) && !aclrtDestroyEvent(event));
}

void pinned_memory_outlives_its_copies() {
  void *stream, *device, *host;
  std::atomic<bool> go{false};
  CHECK(!aclrtCreateStream(&stream) && !aclrtMalloc(&device, 64, 0) && !aclrtMallocHost(&host, 64));
  push(stream, [&go] {
    while (!go) std::this_thread::yield();
  });
  CHECK(!aclrtMemcpyAsync(host, 64, device, 64, 2, stream) && !aclrtFreeHost(host));
  go = true;
  CHECK(aclrtSynchronizeStream(stream) == softnpu::kKernelFault && !aclrtFree(device) &&
        !aclrtDestroyStream(stream));
}

void mapped_memory() {
  constexpr size_t block = size_t{2} << 20;
  void *range, *one, *two;
  CHECK(!aclrtReserveMemAddress(&range, 2 * block, 0, nullptr, 0) &&
        !aclrtMallocPhysical(&one, block, nullptr, 0) &&
        !aclrtMallocPhysical(&two, block, nullptr, 0));
  char* const start = static_cast<char*>(range);
  CHECK(aclrtMapMem(start, 2 * block, 0, one, 0) != 0 &&
        aclrtMapMem(start + 2 * block, block, 0, one, 0) != 0);
  CHECK(!aclrtMapMem(start, block, 0, one, 0));
  CHECK(aclrtMapMem(start + block, block, 0, one, 0) != 0 &&
        aclrtMapMem(start + block / 2, block, 0, two, 0) != 0);
  CHECK(aclrtFreePhysical(one) != 0 && aclrtReleaseMemAddress(range) != 0);
  CHECK(aclrtMemset(start, ~size_t{0}, 1, ~size_t{0}) != 0 && !aclrtMemset(start, block, 1, block));
  CHECK(!aclrtUnmapMem(start) && !aclrtFreePhysical(one) && aclrtFreePhysical(one) != 0 &&
        !aclrtFreePhysical(two));
  CHECK(!aclrtReleaseMemAddress(range) && aclrtReleaseMemAddress(range) != 0);
}

void captures_end_well() {
  void *stream, *event, *graph, *ignored;
  int status;
  CHECK(!aclrtCreateStream(&stream) && !aclrtCreateEventWithFlag(&event, 0) &&
        !aclmdlRICaptureBegin(stream, 0));
  CHECK(!aclmdlRICaptureGetInfo(stream, &status, &graph) &&
        aclmdlRIExecuteAsync(graph, stream) != 0);
  CHECK(!aclrtRecordEvent(event, stream) &&
        aclrtSynchronizeEvent(event) == softnpu::kEventCaptured);
  CHECK(aclmdlRICaptureEnd(stream, &ignored) == softnpu::kCaptureInvalidated &&
        !aclmdlRICaptureBegin(stream, 0));
  CHECK(aclrtDestroyStream(stream) == softnpu::kStreamCaptured);
  CHECK(!aclmdlRICaptureGetInfo(stream, &status, &graph) &&
        aclmdlRIDestroy(graph) == softnpu::kModelCaptured);
  CHECK(!aclmdlRICaptureEnd(stream, &graph) && !aclmdlRIDestroy(graph) &&
        aclmdlRIDestroy(graph) == softnpu::kHandle);
  CHECK(!aclrtDestroyStream(stream) && !aclrtDestroyEvent(event));
}

void other_threads() {
  void* stream;
  CHECK(!aclrtCreateStream(&stream));
  std::thread([] {
    void* p;
    CHECK(aclrtMalloc(&p, 8, 0) == softnpu::kNoContext &&
          aclrtSynchronizeStream(nullptr) == softnpu::kNoContext);
  }).join();
  CHECK(!aclrtDestroyStream(stream));
}

// In a forked child; it has no worker threads, and locks that other threads held stay locked for
// ever.
bool everything_is_refused(void* stream, void* p) {
  void* other;
  return aclrtMemsetAsync(p, 8, 0, 8, stream) && aclrtSynchronizeStream(stream) &&
         aclrtSynchronizeDevice() && aclrtMalloc(&other, 8, 0) && aclrtFree(p) &&
         aclrtCreateStream(&other) && aclrtDestroyStream(stream) && aclrtMemset(p, 8, 0, 8) &&
         aclFinalize() && !softnpu_statistics(nullptr, 0) && softnpu_check_red_zones();
}

void forks() {
  void *stream, *p;
  CHECK(!aclrtCreateStream(&stream) && !aclrtMalloc(&p, 8, 0));
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    CHECK(!aclrtSetDevice(0));
    void *other, *memory;
    while (!stop) {
      CHECK(!aclrtCreateStream(&other) && !aclrtMalloc(&memory, 8, 0) &&
            softnpu_statistics(nullptr, 0));
      CHECK(!aclrtDestroyStream(other) && !aclrtFree(memory));
    }
  });
  for (int i = 0; i < 50; ++i) {
    CHECK(!aclrtMemsetAsync(p, 8, 0, 8, stream));
    const pid_t child = fork();
    if (child == 0) _exit(!everything_is_refused(stream, p));
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
  }
  stop = true;
  busy.join();
  CHECK(!aclrtDestroyStream(stream) && !aclrtFree(p));
}

}  // namespace

int main(int argc, char** argv) {
  setenv("SOFTNPU_DEVICES", "2", 1);
  setenv("SOFTNPU_MEMORY", "64M", 1);
  before_initialisation();
  CHECK(!aclInit(nullptr) && aclInit(nullptr) != 0 && !aclrtSetDevice(0) && aclrtSetDevice(2) != 0);
  if (argc > 1 && std::string(argv[1]) == "race") {
    planted_race();
    return 0;
  }
  producer_and_consumer();
  memory_is_guarded();
  freed_between_launch_and_run();
  many_threads();
  graphs();
  faults();
  event_recorded_again();
  faults_travel();
  pinned_memory_outlives_its_copies();
  mapped_memory();
  captures_end_well();
  refused_in_captures();
  refused_events();
  dead_handles();
  other_threads();
  forks();
  CHECK(!aclrtSynchronizeDevice());
  devices_that_were_reset();
  std::puts("runtime good");
}
