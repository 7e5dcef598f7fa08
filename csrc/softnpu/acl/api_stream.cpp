// Streams, events, host callbacks.
#include "device.h"
#include "registry.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

Registry<Event>& events() {
  static auto* const registry = new Registry<Event>;
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
  return guarded([&] { return remove_stream(stream), kOk; });
}

int create_event(Handle* event, uint32_t flags, bool extended) {
  *event = events().add(std::make_shared<Event>(flags, extended));
  return kOk;
}

// The pages of the two creators say which call wants which flag; 0 is what aclrtCreateEvent makes,
// good for all.
std::shared_ptr<Event> event_with(Handle handle, EventFlag flag, int code, const char* who) {
  auto event = events().find(handle, "event");
  const uint32_t good = flag == kEventSync ? flag | kEventExternal : uint32_t{flag};
  if (event->flags && !(event->flags & good))
    throw Fault(code, std::string("softnpu: ") + who + ": the event was created without " +
                          (flag == kEventSync ? "ACL_EVENT_SYNC" : "ACL_EVENT_TIME_LINE") +
                          " (enable_timing)");
  return event;
}

std::shared_ptr<Event> plain_event(Handle handle, const char* who) {
  auto event = events().find(handle, "event");
  if (event->extended)
    throw Fault(kFeature,
                std::string("softnpu: ") + who + ": not for events of aclrtCreateEventExWithFlag");
  return event;
}

// With its task queue on, torch_npu destroys an event in the queue of the event's device, whatever
// another device's queue has still to do with it.
std::shared_ptr<Event> event_to_wait_for(Handle handle) try {
  return event_with(handle, kEventSync, kFeature, "aclrtStreamWaitEvent");
} catch (const Fault& fault) {
  if (fault.code != kHandle) throw;
  throw Fault(
      kHandle,
      "softnpu: aclrtStreamWaitEvent: the event was destroyed before the wait arrived (between two "
      "devices of one process torch_npu's task queues are not in order: TASK_QUEUE_ENABLE=0)");
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

SOFTNPU_C int aclrtCreateEventExWithFlag(Handle* event, uint32_t flags) {
  SOFTNPU_ENTER();
  return create_event(event, flags, true);
}
SOFTNPU_C int aclrtCreateEventWithFlag(Handle* event, uint32_t flags) {
  SOFTNPU_ENTER();
  return create_event(event, flags, false);
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
  return guarded([&] { return stream_of(stream)->wait(event_to_wait_for(event)), kOk; });
}

SOFTNPU_C int aclrtResetEvent(Handle handle, Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] {
    const auto event = events().find(handle, "event");
    if (event->external) return stream_of(stream)->reset(event), kOk;
    return plain_event(handle, "aclrtResetEvent"), kOk;
  });
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
  return guarded([&] {
    return *status = happened(*plain_event(event, "aclrtQueryEventWaitStatus")) ? 0 : 1, kOk;
  });
}

SOFTNPU_C int aclrtEventGetTimestamp(Handle handle, uint64_t* microseconds) {
  SOFTNPU_ENTER();
  return guarded([&]() -> int {
    const auto event =
        event_with(handle, kEventTimeLine, kEventTimestamp, "aclrtEventGetTimestamp");
    if (!happened(*event)) return fail(kEventTimestamp, "softnpu: the event has not happened yet");
    *microseconds = time_of(*event) / 1000;
    return kOk;
  });
}

SOFTNPU_C int aclrtEventElapsedTime(float* ms, Handle start, Handle end) {
  SOFTNPU_ENTER();
  return guarded([&]() -> int {
    const auto first = event_with(start, kEventTimeLine, kEventTimestamp, "aclrtEventElapsedTime");
    const auto second = event_with(end, kEventTimeLine, kEventTimestamp, "aclrtEventElapsedTime");
    if (!happened(*first) || !happened(*second))
      return fail(kEventTimestamp, "softnpu: an event has not happened yet");
    *ms = static_cast<float>(
        static_cast<double>(static_cast<int64_t>(time_of(*second) - time_of(*first))) / 1e6);
    return kOk;
  });
}

SOFTNPU_C int aclrtLaunchHostFunc(Handle stream, void (*function)(void*), void* arguments) {
  SOFTNPU_ENTER();
  return guarded([&] {
    return stream_of(stream)->push({"aclrtLaunchHostFunc", [=] { function(arguments); }}), kOk;
  });
}
