// What an event is for the host: waiting for it, asking for it, its time.
#include "report.h"
#include "stream.h"

namespace softnpu {

Event::Event(uint32_t flags, bool extended) : flags(flags), extended(extended) {
  if (flags & kEventExternal) external = std::make_shared<Signal>();
  alive(Alive::kEvent, 1);
}
Event::~Event() { alive(Alive::kEvent, -1); }

bool wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                int timeout_ms, const std::function<bool()>& ready) {
  if (timeout_ms < 0) {
    changed.wait(lock, ready);
    return true;
  }
  return changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
}

namespace {

std::shared_ptr<Record> latest(Event& event) {
  std::lock_guard lock(event.mutex);
  return event.latest;
}

// The capture in which the event was recorded last, while that goes on: the event never happens by
// itself.
std::shared_ptr<Graph> capture_of(Event& event) {
  std::lock_guard lock(capture_lock());
  std::lock_guard event_lock(event.mutex);
  const auto graph = event.graph.lock();
  return graph && !graph->ended ? graph : nullptr;
}

}  // namespace

int wait_event(Event& event, int timeout_ms) {
  if (const auto graph = capture_of(event)) {
    std::lock_guard lock(capture_lock());
    graph->spoilt = "an event that was recorded in it was to be synchronised";
    return fail(kEventCaptured, "softnpu: a capture goes on and %s", graph->spoilt.c_str());
  }
  const auto record = latest(event);
  if (!record) return kOk;
  std::unique_lock lock(record->mutex);
  if (!wait_until(record->changed, lock, timeout_ms, [&] { return record->done; }))
    return fail(kTimeout, "softnpu: the event did not happen within %d ms", timeout_ms);
  return record->failure ? record->failure->report() : kOk;
}

bool happened(Event& event) {
  if (capture_of(event))
    throw Fault(kEventCaptured, "softnpu: the event was recorded in a capture: it cannot be asked");
  const auto record = latest(event);
  if (!record) return true;
  std::lock_guard lock(record->mutex);
  return record->done;
}

uint64_t time_of(Event& event) {
  const auto record = latest(event);
  if (!record) return 0;
  std::lock_guard lock(record->mutex);
  return record->time_ns;
}

}  // namespace softnpu
