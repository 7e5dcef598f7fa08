// Graph capture and replay: a captured stream appends its tasks to a graph; events carry the order between streams.
#include <algorithm>

#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

void merge(Clock* into, const Clock& from) {
  if (into->size() < from.size()) into->resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

}  // namespace

void capture_join(Stream& stream, const std::shared_ptr<Graph>& graph, const Clock& clock) {
  if (!stream.capture_) {
    stream.capture_ = graph;
    graph->members.push_back(stream.shared_from_this());
    graph->clocks.emplace_back();
  }
  merge(&graph->clocks[stream.member_of(*graph)], clock);
}

size_t Stream::member_of(const Graph& graph) const {
  for (size_t i = 0; i < graph.members.size(); ++i) {
    if (graph.members[i].get() == this) return i;
  }
  throw Fault(kNnInner, "softnpu: stream is no member of its capture");
}

void Stream::abandon_capture() {
  std::lock_guard lock(capture_lock());
  if (!capture_) return;
  capture_->valid = false;
  if (capture_->members[0].get() != this) return;  // the stream on which it began learns it when it ends
  const std::shared_ptr<Graph> ended = capture_;
  ended->ended = true;
  const auto members = std::move(ended->members);
  ended->members.clear();
  for (const auto& member : members) member->capture_.reset();
}

int Stream::begin_capture() {
  std::lock_guard lock(capture_lock());
  if (capture_) return fail(kStreamCaptured, "softnpu: stream %d is captured already", id);
  capture_ = std::make_shared<Graph>();
  capture_->members.push_back(shared_from_this());
  capture_->clocks.emplace_back();
  return kOk;
}

int Stream::end_capture(std::shared_ptr<Graph>* graph) {
  std::lock_guard lock(capture_lock());
  if (!capture_ || capture_->members[0].get() != this)
    return fail(kStreamCaptured, "softnpu: no capture began on stream %d", id);
  const std::shared_ptr<Graph> ended = capture_;
  ended->ended = true;
  int code = ended->valid ? kOk : fail(kStreamCaptured, "softnpu: the capture was invalidated");
  Clock joined = ended->clocks[0];
  joined.resize(ended->members.size());
  for (size_t i = 0; i < ended->members.size(); ++i) {
    ended->members[i]->capture_.reset();
    const Clock& own = ended->clocks[i];
    if (code == kOk && i < own.size() && own[i] > joined[i])
      code = fail(kStreamUnjoined, "softnpu: stream %d was forked into the capture and not joined again",
                  ended->members[i]->id);
  }
  ended->members.clear();
  if (code == kOk) *graph = ended;
  return code;
}

int Stream::capture_state(std::shared_ptr<Graph>* graph) {
  std::lock_guard lock(capture_lock());
  *graph = capture_;
  if (!capture_) return kCaptureNone;
  return capture_->valid ? kCaptureActive : kCaptureInvalid;
}

namespace {

// With chaos, a random order that respects the captured dependencies; without, the order of capture.
std::vector<size_t> replay_order(const Graph& graph, uint64_t seed) {
  std::vector<size_t> order, left;
  for (size_t i = 0; i < graph.nodes.size(); ++i) (seed ? left : order).push_back(i);
  Clock done;
  while (!left.empty()) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < left.size(); ++i) {
      const Clock& before = graph.nodes[left[i]].before;
      bool runnable = true;
      for (size_t member = 0; member < before.size(); ++member)
        runnable &= before[member] <= (member < done.size() ? done[member] : 0);
      if (runnable) ready.push_back(i);
    }
    const size_t pick = ready[mix(seed + order.size()) % ready.size()];
    const size_t node = left[pick];
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(pick));
    order.push_back(node);
    done.resize(std::max(done.size(), graph.nodes[node].member + 1));
    done[graph.nodes[node].member]++;
  }
  return order;
}

}  // namespace

void Stream::replay(const std::shared_ptr<Graph>& graph) {
  {
    std::lock_guard lock(capture_lock());
    if (!graph->ended) throw Fault(kStreamCaptured, "softnpu: the graph is still being captured");
  }
  for (const size_t node : replay_order(*graph, chaos_seed())) {
    Task task = graph->nodes[node].task;
    task.run = [graph, node] { graph->nodes[node].task.run(); };
    push(std::move(task));
  }
}

}  // namespace softnpu
