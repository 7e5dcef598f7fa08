// Streams, events, host callbacks, graph capture and replay.
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "device.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

template <class T>
class Registry {
 public:
  Handle add(std::shared_ptr<T> object) {
    std::lock_guard lock(mutex_);
    const Handle handle = object.get();
    all_[handle] = std::move(object);
    return handle;
  }
  std::shared_ptr<T> find(Handle handle, const char* what) {
    std::lock_guard lock(mutex_);
    const auto found = all_.find(handle);
    if (found == all_.end()) throw Fault(kHandle, std::string("softnpu: not a live ") + what);
    return found->second;
  }
  void remove(Handle handle, const char* what) {
    std::shared_ptr<T> last = find(handle, what);
    std::lock_guard lock(mutex_);
    all_.erase(handle);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Handle, std::shared_ptr<T>> all_;
};

Registry<Event>& events() {
  static auto* const registry = new Registry<Event>;
  return *registry;
}

Registry<Graph>& graphs() {
  static auto* const registry = new Registry<Graph>;
  return *registry;
}

template <class Action>
int guarded(Action action) try {
  return action();
} catch (const Fault& fault) {
  return fail(fault);
}

int create_stream(Handle* stream, uint32_t flags) {
  return guarded([&] { return *stream = add_stream(require_device(), flags), kOk; });
}

int destroy_stream(Handle stream) {
  return remove_stream(stream) ? kOk : fail(kHandle, "softnpu: not a live stream (destroyed twice?)");
}

int create_event(Handle* event) {
  alive(Alive::kEvent, 1);
  *event = events().add(std::make_shared<Event>());
  return kOk;
}

std::shared_ptr<Stream> stream_of(Handle handle) { return find_stream(handle, current_device()); }

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclrtCreateStream(Handle* stream) {
  SOFTNPU_ENTER();
  return create_stream(stream, 0);
}
SOFTNPU_C int aclrtCreateStreamWithConfig(Handle* stream, uint32_t, uint32_t flags) {
  SOFTNPU_ENTER();
  return create_stream(stream, flags);
}
SOFTNPU_C int aclrtDestroyStream(Handle stream) {
  SOFTNPU_ENTER();
  return destroy_stream(stream);
}
SOFTNPU_C int aclrtDestroyStreamForce(Handle stream) {
  SOFTNPU_ENTER();
  return destroy_stream(stream);
}

SOFTNPU_C int aclrtSetStreamFailureMode(Handle stream, uint64_t mode) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->stop_on_failure = mode == 1, kOk; });
}

SOFTNPU_C int aclrtSetStreamAttribute(Handle, int, void*) {
  SOFTNPU_ENTER();
  return kOk;
}

SOFTNPU_C int aclrtSynchronizeStream(Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->synchronise(-1); });
}

SOFTNPU_C int aclrtSynchronizeStreamWithTimeout(Handle stream, int32_t timeout) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->synchronise(timeout); });
}

SOFTNPU_C int aclrtStreamQuery(Handle stream, int* status) {
  SOFTNPU_ENTER();
  return guarded([&] { return *status = stream_of(stream)->idle() ? 0 : 1, kOk; });
}

SOFTNPU_C int aclrtStreamGetId(Handle stream, int32_t* id) {
  SOFTNPU_ENTER();
  return guarded([&] { return *id = stream_of(stream)->id, kOk; });
}

SOFTNPU_C int aclrtCreateEventExWithFlag(Handle* event, uint32_t) {
  SOFTNPU_ENTER();
  return create_event(event);
}
SOFTNPU_C int aclrtCreateEventWithFlag(Handle* event, uint32_t) {
  SOFTNPU_ENTER();
  return create_event(event);
}

SOFTNPU_C int aclrtDestroyEvent(Handle event) {
  SOFTNPU_ENTER();
  return guarded([&] { return events().remove(event, "event"), kOk; });
}

SOFTNPU_C int aclrtRecordEvent(Handle event, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->record(events().find(event, "event")), kOk; });
}

SOFTNPU_C int aclrtStreamWaitEvent(Handle stream, Handle event) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->wait(events().find(event, "event")), kOk; });
}

SOFTNPU_C int aclrtResetEvent(Handle event, Handle) {
  SOFTNPU_ENTER();
  return guarded([&] { return events().find(event, "event"), kOk; });
}

SOFTNPU_C int aclrtSynchronizeEvent(Handle event) {
  SOFTNPU_ENTER();
  return guarded([&] { return wait_event(*events().find(event, "event"), -1); });
}

SOFTNPU_C int aclrtQueryEventStatus(Handle event, int* status) {
  SOFTNPU_ENTER();
  return guarded([&] { return *status = happened(*events().find(event, "event")) ? 1 : 0, kOk; });
}

SOFTNPU_C int aclrtQueryEventWaitStatus(Handle event, int* status) {
  SOFTNPU_ENTER();
  return guarded([&] { return *status = happened(*events().find(event, "event")) ? 0 : 1, kOk; });
}

SOFTNPU_C int aclrtEventGetTimestamp(Handle handle, uint64_t* microseconds) {
  SOFTNPU_ENTER();
  return guarded([&] {
    *microseconds = time_of(*events().find(handle, "event")) / 1000;
    return kOk;
  });
}

SOFTNPU_C int aclrtEventElapsedTime(float* ms, Handle start, Handle end) {
  SOFTNPU_ENTER();
  return guarded([&]() -> int {
    const auto first = events().find(start, "event"), second = events().find(end, "event");
    if (!happened(*first) || !happened(*second)) return fail(kEventTimestamp, "softnpu: an event has not happened yet");
    *ms = static_cast<float>(static_cast<double>(static_cast<int64_t>(time_of(*second) - time_of(*first))) / 1e6);
    return kOk;
  });
}

SOFTNPU_C int aclrtLaunchHostFunc(Handle stream, void (*function)(void*), void* arguments) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->push({"aclrtLaunchHostFunc", [=] { function(arguments); }}), kOk; });
}

SOFTNPU_C int aclmdlRICaptureBegin(Handle stream, int) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const int code = stream_of(stream)->begin_capture();
    std::shared_ptr<Graph> graph;
    if (code == kOk && stream_of(stream)->capture_state(&graph) != kCaptureNone)
      graphs().add(graph);  // has a handle while it grows
    return code;
  });
}

SOFTNPU_C int aclmdlRICaptureGetInfo(Handle stream, int* status, Handle* graph) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::shared_ptr<Graph> captured;
    *status = stream_of(stream)->capture_state(&captured);
    if (graph) *graph = captured.get();
    return kOk;
  });
}

SOFTNPU_C int aclmdlRICaptureEnd(Handle stream, Handle* graph) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::shared_ptr<Graph> growing, captured;
    stream_of(stream)->capture_state(&growing);
    const int code = stream_of(stream)->end_capture(&captured);
    if (code && growing) graphs().remove(growing.get(), "graph");
    *graph = captured.get();
    return code;
  });
}

SOFTNPU_C int aclmdlRIExecuteAsync(Handle graph, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->replay(graphs().find(graph, "graph")), kOk; });
}

SOFTNPU_C int aclmdlRIDestroy(Handle graph) {
  SOFTNPU_ENTER();
  return guarded([&] { return graphs().remove(graph, "graph"), kOk; });
}

SOFTNPU_C int aclmdlRIGetId(Handle graph, uint32_t* id) {
  SOFTNPU_ENTER();
  return guarded([&] { return *id = graphs().find(graph, "graph")->id, kOk; });
}

SOFTNPU_C int aclmdlRICaptureThreadExchangeMode(int*) {
  SOFTNPU_ENTER();
  return kOk;
}
