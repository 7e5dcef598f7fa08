// What the runtime refuses, as CANN does: calls outside the life of a device, unsafe calls in a
// capture, events used for what they were not created for, handles that are dead.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "runtime_test.h"
#include "softnpu/acl/stream.h"

using namespace softnpu;

namespace {

int on_another_thread(const std::function<int()>& call) {
  int code = -1;
  std::thread([&] {
    CHECK(!aclrtSetDevice(0));
    code = call();
  }).join();
  return code;
}

struct Blocks {
  void *stream, *device, *pinned;
  char pageable[64];
  Blocks() {
    CHECK(!aclrtCreateStream(&stream) && !aclrtMalloc(&device, 64, 0) &&
          !aclrtMallocHost(&pinned, 64));
  }
  ~Blocks() { CHECK(!aclrtDestroyStream(stream) && !aclrtFree(device) && !aclrtFreeHost(pinned)); }
  int copy() { return aclrtMemcpy(device, 64, pageable, 64, kHostToDevice); }
  int copy_later(void* host, void* to) {
    return aclrtMemcpyAsync(device, 64, host, 64, kHostToDevice, to);
  }
  int end() {
    void* graph = nullptr;
    const int code = aclmdlRICaptureEnd(stream, &graph);
    if (code == kOk) CHECK(!aclmdlRIDestroy(graph));
    return code;
  }
};

int exchange(int mode) {
  CHECK(!aclmdlRICaptureThreadExchangeMode(&mode));
  return mode;
}

// Which threads may call what, by mode: the page of aclmdlRICaptureThreadExchangeMode.
void modes() {
  Blocks b;
  struct Case {
    int mode;
    bool own, other;  // may call unsafe functions
  };
  for (const Case& expected : {Case{kCaptureGlobal, false, false},
                               {kCaptureThreadLocal, false, true},
                               {kCaptureRelaxed, true, true}}) {
    for (const bool own : {true, false}) {
      const bool allowed = own ? expected.own : expected.other;
      const auto copy = [&] { return b.copy(); };
      CHECK(!aclmdlRICaptureBegin(b.stream, expected.mode));
      CHECK((own ? copy() : on_another_thread(copy)) == (allowed ? kOk : kCaptureMode));
      CHECK(b.end() == (allowed ? kOk : kCaptureInvalidated));
    }
  }
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureGlobal) &&
        exchange(kCaptureRelaxed) == kCaptureGlobal && !b.copy());
  CHECK(exchange(kCaptureGlobal) == kCaptureRelaxed);
  CHECK(!on_another_thread([&] { return exchange(kCaptureThreadLocal), b.copy(); }) &&
        b.end() == kOk);
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureGlobal));
  CHECK(aclrtMemset(b.device, 64, 0, 64) == kCaptureMode && b.end() == kCaptureInvalidated);
  CHECK(!b.copy());  // outside a capture
  int mode = 3;
  CHECK(aclmdlRICaptureThreadExchangeMode(&mode) == kParameter &&
        aclmdlRICaptureBegin(b.stream, 3) == kParameter);
  CHECK(b.end() == kStreamNotCaptured);
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureGlobal));
  CHECK(on_another_thread([&] { return b.end(); }) == kCaptureThread &&
        b.end() == kStreamNotCaptured);
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureRelaxed) &&
        !on_another_thread([&] { return b.end(); }));
}

// In every mode.
void questions() {
  Blocks b;
  void *event, *before, *other, *graph;
  int status;
  CHECK(!aclrtCreateEventExWithFlag(&event, kEventSync) &&
        !aclrtCreateEventExWithFlag(&before, kEventSync));
  CHECK(!aclrtCreateStream(&other) && !aclrtRecordEvent(before, other));
  CHECK(aclmdlRICaptureBegin(nullptr, kCaptureRelaxed) == kCaptureImplicit);
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureRelaxed) && !aclrtRecordEvent(event, b.stream));
  CHECK(aclmdlRICaptureBegin(b.stream, kCaptureRelaxed) == kStreamCaptured);
  CHECK(aclrtStreamQuery(b.stream, &status) == kStreamCaptured &&
        !aclrtStreamQuery(other, &status));
  CHECK(aclrtQueryEventStatus(event, &status) == kEventCaptured &&
        aclrtStreamWaitEvent(nullptr, event) != 0);
  CHECK(b.copy_later(b.pinned, nullptr) == kCaptureImplicit && !b.copy_later(b.pinned, b.stream));
  CHECK(aclrtStreamWaitEvent(b.stream, before) == kCaptureDependency);
  CHECK(!aclrtStreamWaitEvent(other, event) &&
        aclmdlRICaptureEnd(other, &graph) == kCaptureUnmatched);
  CHECK(!aclrtRecordEvent(event, other) && !aclrtStreamWaitEvent(b.stream, event) &&
        b.end() == kOk);
  CHECK(!aclmdlRICaptureBegin(b.stream, kCaptureRelaxed) &&
        aclrtSynchronizeDevice() == kStreamCaptured);
  CHECK(b.end() == kOk && !aclmdlRICaptureBegin(b.stream, kCaptureRelaxed));
  CHECK(b.copy_later(b.pageable, b.stream) == kStreamCaptured && b.end() == kCaptureInvalidated);
  CHECK(!aclrtDestroyStream(other) && !aclrtDestroyEvent(event) && !aclrtDestroyEvent(before));
}

void two_captures() {
  Blocks one, two;
  void* event;
  CHECK(!aclrtCreateEventExWithFlag(&event, kEventSync));
  CHECK(!aclmdlRICaptureBegin(one.stream, kCaptureGlobal) &&
        !aclmdlRICaptureBegin(two.stream, kCaptureGlobal));
  CHECK(!aclrtRecordEvent(event, one.stream) &&
        aclrtStreamWaitEvent(two.stream, event) == kCaptureConflict);
  CHECK(one.end() == kCaptureInvalidated && two.end() == kCaptureInvalidated &&
        !aclrtDestroyEvent(event));
}

// What a graph uses is given back between its capture and its replay: found by the replay, once.
void freed_before_a_replay() {
  Blocks b;
  void *graph, *gone;
  CHECK(!aclrtMalloc(&gone, 64, 0) && !aclmdlRICaptureBegin(b.stream, kCaptureGlobal));
  CHECK(!aclrtMemsetAsync(gone, 64, 1, 64, b.stream) && !b.copy_later(b.pinned, b.stream));
  CHECK(!aclmdlRICaptureEnd(b.stream, &graph));
  CHECK(!aclmdlRIExecuteAsync(graph, b.stream) && !aclrtSynchronizeStream(b.stream) &&
        !aclrtFree(gone));
  CHECK(!aclmdlRIExecuteAsync(graph, b.stream) &&
        aclrtSynchronizeStream(b.stream) == kReadOutOfBounds);
  CHECK(!aclrtSynchronizeStream(b.stream) && !aclmdlRIDestroy(graph));
}

}  // namespace

void before_initialisation() {
  int device;
  uint32_t count = 0;
  void* pointer;
  CHECK(!aclrtGetDeviceCount(&count) && count == 2);
  CHECK(aclrtSetDevice(0) == kNotInitialised && aclrtGetDevice(&device) == kNoContext);
  CHECK(aclrtMalloc(&pointer, 8, 0) == kNoContext && aclrtCreateStream(&pointer) == kNoContext);
  CHECK(aclFinalize() == kFinalisedAlready);
}

void refused_in_captures() {
  modes();
  questions();
  two_captures();
  freed_before_a_replay();
}

void refused_events() {
  void *stream, *sync, *timed, *old;
  float ms;
  int status;
  CHECK(!aclrtCreateStream(&stream) && !aclrtCreateEventExWithFlag(&sync, kEventSync) &&
        !aclrtCreateEventExWithFlag(&timed, kEventTimeLine) &&
        !aclrtCreateEventWithFlag(&old, kEventSync));
  CHECK(aclrtEventElapsedTime(&ms, timed, timed) == kOk &&
        aclrtEventElapsedTime(&ms, timed, sync) == kEventTimestamp);
  CHECK(aclrtStreamWaitEvent(stream, timed) == kFeature && !aclrtStreamWaitEvent(stream, sync));
  CHECK(aclrtResetEvent(sync, stream) == kFeature && !aclrtResetEvent(old, stream));
  CHECK(aclrtQueryEventWaitStatus(sync, &status) == kFeature &&
        !aclrtQueryEventWaitStatus(old, &status));
  CHECK(!aclrtDestroyEvent(sync) && aclrtDestroyEvent(sync) == kHandle &&
        aclrtStreamWaitEvent(stream, sync) == kHandle);
  CHECK(std::string(last_message()).find("before the wait arrived") != std::string::npos);
  CHECK(!aclrtDestroyStream(stream) && aclrtRecordEvent(old, stream) == kHandle);
  CHECK(!aclrtDestroyEvent(timed) && !aclrtDestroyEvent(old));
}

void dead_handles() {
  const int64_t sizes[] = {2, 3}, strides[] = {3, 1};
  const auto tensor = [&] {
    return aclCreateTensor(sizes, 2, kFloat, strides, 0, kFormatNd, sizes, 2, nullptr);
  };
  const auto refused = [](const auto* handle, const char* text) {
    try {
      refuse_dead(handle, 4);
    } catch (const Fault& fault) {
      return fault.code == kNnParameter &&
             std::string(fault.what()).find(text) != std::string::npos;
    }
    return false;
  };
  aclTensor* const one = tensor();
  CHECK(!refused(one, "") && !aclDestroyTensor(one) && aclDestroyTensor(one) == kNnParameter);
  CHECK(refused(one, "argument 4 is no live aclTensor") && !aclDestroyTensor(nullptr));
  int64_t* shape;
  uint64_t rank;
  CHECK(aclGetViewShape(one, &shape, &rank) == kNnParameter);
  int on_the_stack;
  for (const void* never :
       {static_cast<const void*>(&on_the_stack), reinterpret_cast<const void*>(0x1234)})
    CHECK(aclDestroyScalar(static_cast<const aclScalar*>(never)) == kNnParameter &&
          refused(static_cast<const aclIntArray*>(never), "no live aclIntArray"));
  aclTensor* const two = tensor();
  CHECK(two != one);  // an address rests before it is given out again
  aclTensorList* const list = aclCreateTensorList(&two, 1);
  CHECK(!refused(list, "") && !aclDestroyTensor(two) && refused(list, "no live aclTensor "));
  CHECK(aclDestroyTensorList(list) == kNnParameter && aclDestroyTensorList(list) == kNnParameter);
  float value = 1;
  aclScalar* const scalar = aclCreateScalar(&value, kFloat);
  aclIntArray* const array = aclCreateIntArray(sizes, 2);
  CHECK(!aclDestroyScalar(scalar) && aclDestroyScalar(scalar) != 0 && !aclDestroyIntArray(array));
  CHECK(aclDestroyIntArray(array) != 0 &&
        aclDestroyTensor(reinterpret_cast<aclTensor*>(array)) != 0);
}

// A reset ends the device for every thread that had chosen it; so does aclFinalize, until the next
// aclInit.
void devices_that_were_reset() {
  std::atomic<int> step{0};
  std::thread other([&] {
    int device;
    void* p;
    CHECK(!aclrtSetDevice(1) && !aclrtMalloc(&p, 8, 0) && !aclrtFree(p));
    step = 1;
    while (step != 2) std::this_thread::yield();
    CHECK(aclrtMalloc(&p, 8, 0) == kNoContext && aclrtGetDevice(&device) == kNoContext);
    CHECK(!aclrtSetDevice(1) && !aclrtMalloc(&p, 8, 0) && !aclrtFree(p));
  });
  while (step != 1) std::this_thread::yield();
  int device;
  void *p, *context;
  CHECK(!aclrtGetCurrentContext(&context) && !aclrtResetDevice(1) && !aclrtGetDevice(&device) &&
        device == 0);
  step = 2;
  other.join();
  CHECK(!aclFinalize() && aclFinalize() == kFinalisedAlready &&
        aclrtMalloc(&p, 8, 0) == kNoContext);
  CHECK(aclrtSetDevice(0) == kNotInitialised && aclrtSetCurrentContext(context) == kNotInitialised);
  CHECK(!aclInit(nullptr) && aclrtMalloc(&p, 8, 0) == kNoContext && !aclrtSetDevice(0));
  CHECK(!aclrtMalloc(&p, 8, 0) && !aclrtFree(p) && !aclFinalize());
}
