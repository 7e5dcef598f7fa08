// Graph capture, replay, and the update of captured tasks.
#include <fstream>

#include "device.h"
#include "registry.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

Registry<Graph>& graphs() {
  static auto* const registry = new Registry<Graph>;
  return *registry;
}

Registry<TaskGroup>& groups() {
  static auto* const registry = new Registry<TaskGroup>;
  return *registry;
}

template <class Action>
int guarded(Action action) try {
  return action();
} catch (const Fault& fault) {
  return fail(fault);
}

bool goes_on(const Graph& graph) {
  std::lock_guard lock(capture_lock());
  return !graph.ended;
}

int known_mode(int mode) {
  if (mode >= kCaptureGlobal && mode <= kCaptureRelaxed) return kOk;
  return fail(kParameter, "softnpu: capture mode %d found, 0 to 2 expected", mode);
}

std::shared_ptr<Stream> stream_of(Handle handle) { return find_stream(handle, current_device()); }

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclmdlRICaptureBegin(Handle stream, int mode) {
  SOFTNPU_ENTER();
  if (const int code = known_mode(mode)) return code;
  return guarded([&]() -> int {
    if (!stream) return fail(kCaptureImplicit, "softnpu: the default stream cannot be captured");
    const int code = stream_of(stream)->begin_capture(mode);
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
    if (code && growing && !goes_on(*growing)) graphs().remove(growing.get(), "graph");
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
  return guarded([&]() -> int {
    if (!graphs().find(graph, "graph")->ended)
      return fail(kModelCaptured, "softnpu: the graph is still being captured");
    return graphs().remove(graph, "graph"), kOk;
  });
}

SOFTNPU_C int aclmdlRIGetId(Handle graph, uint32_t* id) {
  SOFTNPU_ENTER();
  return guarded([&] { return *id = graphs().find(graph, "graph")->id, kOk; });
}

SOFTNPU_C int aclmdlRICaptureThreadExchangeMode(int* mode) {
  SOFTNPU_ENTER();
  if (const int code = known_mode(*mode)) return code;
  return *mode = exchange_capture_mode(*mode), kOk;
}

SOFTNPU_C int aclmdlRICaptureTaskGrpBegin(Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->begin_group(); });
}

SOFTNPU_C int aclmdlRICaptureTaskGrpEnd(Handle stream, Handle* handle) {
  SOFTNPU_ENTER();
  return guarded([&] {
    std::shared_ptr<TaskGroup> group;
    const int code = stream_of(stream)->end_group(&group);
    if (code == kOk) *handle = groups().add(group);
    return code;
  });
}

SOFTNPU_C int aclmdlRICaptureTaskUpdateBegin(Handle stream, Handle group) {
  SOFTNPU_ENTER();
  return guarded(
      [&] { return stream_of(stream)->begin_update(groups().find(group, "task group")); });
}

SOFTNPU_C int aclmdlRICaptureTaskUpdateEnd(Handle stream) {
  SOFTNPU_ENTER();
  return guarded([&] { return stream_of(stream)->end_update(); });
}

// The tasks of a graph as a Chrome trace, which torch_npu reads: one place each, a row for each
// stream.
SOFTNPU_C int aclmdlRIDebugJsonPrint(Handle handle, const char* path, uint32_t) {
  SOFTNPU_ENTER();
  return guarded([&]() -> int {
    const auto graph = graphs().find(handle, "graph");
    if (!graph->ended) return fail(kModelCaptured, "softnpu: the graph is still being captured");
    std::ofstream out(path ? path : "");
    out << "[";
    size_t place = 0;
    for (const GraphNode& node : graph->nodes) {
      out << (place ? ", " : "") << "{\"name\": \"" << node.task.name
          << "\", \"ph\": \"X\", \"dur\": 1, \"ts\": " << place << ", \"pid\": " << graph->id
          << ", \"tid\": " << node.member << "}";
      ++place;
    }
    out << "]\n";
    return out ? kOk : fail(kParameter, "softnpu: cannot write %s", path ? path : "nothing");
  });
}
