// Graph capture and replay: a captured stream appends its tasks to a graph; events carry the order
// between streams.
#include <algorithm>
#include <atomic>
#include <utility>

#include "device.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

std::atomic<uint32_t> next_graph{1};
std::atomic<size_t> capturing{0};  // how many captures go on: most calls need not take the lock
thread_local int thread_mode = kCaptureGlobal;

// The captures that go on, under the capture lock.
std::vector<Graph*>& captures() {
  static auto* const all = new std::vector<Graph*>;
  return *all;
}

void enlist(Graph* graph) {
  captures().push_back(graph);
  capturing = captures().size();
}

void delist(Graph* graph) {
  std::erase(captures(), graph);
  capturing = captures().size();
}

// The rules of aclmdlRICaptureThreadExchangeMode's page.
bool forbids(const Graph& graph) {
  const bool own = graph.thread == std::this_thread::get_id();
  if (thread_mode == kCaptureRelaxed || graph.mode == kCaptureRelaxed) return false;
  return own || (graph.mode == kCaptureGlobal && thread_mode == kCaptureGlobal);
}

void merge(Clock* into, const Clock& from) {
  if (into->size() < from.size()) into->resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

}  // namespace

Graph::Graph(int device, int mode) : id(next_graph++), device(device), mode(mode) {
  alive(Alive::kGraph, 1);
}
Graph::~Graph() { alive(Alive::kGraph, -1); }

int exchange_capture_mode(int mode) { return std::exchange(thread_mode, mode); }

void refuse_in_capture(const char* who) {
  if (!capturing) return;
  std::lock_guard lock(capture_lock());
  for (Graph* graph : captures()) {
    if (graph->device != current_device() || !forbids(*graph)) continue;
    graph->spoilt = std::string(who) + " while stream " + std::to_string(graph->members[0]->id) +
                    " is captured in mode " +
                    (graph->mode == kCaptureGlobal ? "GLOBAL" : "THREAD_LOCAL") +
                    ": this thread must be in mode RELAXED (aclmdlRICaptureThreadExchangeMode)";
    throw Fault(kCaptureMode, "softnpu: " + graph->spoilt);
  }
}

void refuse_default_stream(int device) {
  if (!capturing) return;
  std::lock_guard lock(capture_lock());
  for (const Graph* graph : captures()) {
    if (graph->device == device)
      throw Fault(kCaptureImplicit, "softnpu: the default stream of device " +
                                        std::to_string(device) + " is used while stream " +
                                        std::to_string(graph->members[0]->id) + " is captured");
  }
}

void capture_join(Stream& stream, const std::shared_ptr<Graph>& graph, const Clock& clock) {
  if (stream.capture_ && stream.capture_ != graph) {
    stream.capture_->spoilt = graph->spoilt =
        "stream " + std::to_string(stream.id) +
        " of one capture waits for an event that was recorded in another";
    throw Fault(kCaptureConflict, "softnpu: " + graph->spoilt);
  }
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

int Stream::begin_capture(int mode) {
  std::lock_guard lock(capture_lock());
  if (capture_) return fail(kStreamCaptured, "softnpu: stream %d is captured already", id);
  capture_ = std::make_shared<Graph>(device, mode);
  enlist(capture_.get());
  capture_->members.push_back(shared_from_this());
  capture_->clocks.emplace_back();
  return kOk;
}

int Stream::end_capture(std::shared_ptr<Graph>* graph) {
  std::lock_guard lock(capture_lock());
  if (!capture_) return fail(kStreamNotCaptured, "softnpu: stream %d is not captured", id);
  if (capture_->members[0].get() != this)
    return fail(kCaptureUnmatched, "softnpu: the capture began on stream %d, not on stream %d",
                capture_->members[0]->id, id);
  const std::shared_ptr<Graph> ended = capture_;
  delist(ended.get());
  ended->ended = true;
  int code = kOk;
  if (!ended->spoilt.empty())
    code = fail(kCaptureInvalidated, "softnpu: the capture was lost: %s", ended->spoilt.c_str());
  if (ended->mode != kCaptureRelaxed && ended->thread != std::this_thread::get_id())
    code = fail(kCaptureThread, "softnpu: the capture of stream %d began on another thread", id);
  Clock joined = ended->clocks[0];
  joined.resize(ended->members.size());
  for (size_t i = 0; i < ended->members.size(); ++i) {
    ended->members[i]->capture_.reset();
    const Clock& own = ended->clocks[i];
    if (code == kOk && i < own.size() && own[i] > joined[i])
      code = fail(kStreamUnjoined,
                  "softnpu: stream %d was forked into the capture and not joined again",
                  ended->members[i]->id);
  }
  ended->members.clear();
  if (code == kOk) *graph = ended;
  return code;
}

int Stream::begin_group() {
  std::lock_guard lock(capture_lock());
  if (!capture_) return fail(kStreamNotCaptured, "softnpu: stream %d is not captured", id);
  if (group_) return fail(kParameter, "softnpu: stream %d has begun a task group already", id);
  group_ = std::make_shared<TaskGroup>();
  group_->graph = capture_;
  return kOk;
}

int Stream::end_group(std::shared_ptr<TaskGroup>* group) {
  std::lock_guard lock(capture_lock());
  if (!group_) return fail(kParameter, "softnpu: stream %d has begun no task group", id);
  *group = std::exchange(group_, nullptr);
  return kOk;
}

int Stream::begin_update(const std::shared_ptr<TaskGroup>& group) {
  std::lock_guard lock(capture_lock());
  if (capture_) return fail(kStreamCaptured, "softnpu: stream %d is captured", id);
  if (updated_) return fail(kParameter, "softnpu: stream %d updates a task group already", id);
  updated_ = group, replaced_ = 0;
  return kOk;
}

int Stream::end_update() {
  std::lock_guard lock(capture_lock());
  const auto group = std::exchange(updated_, nullptr);
  if (!group) return fail(kParameter, "softnpu: stream %d updates no task group", id);
  if (replaced_ == group->nodes.size()) return kOk;
  return fail(kParameter, "softnpu: %zu tasks were given for a group of %zu", replaced_,
              group->nodes.size());
}

void Stream::replace(Task task) {
  const auto graph = updated_->graph.lock();
  if (!graph) throw Fault(kHandle, "softnpu: the graph of the task group was destroyed");
  if (replaced_ == updated_->nodes.size())
    throw Fault(kParameter, "softnpu: " + task.name + ": the task group has only " +
                                std::to_string(replaced_) + " tasks");
  Task& old = graph->nodes[updated_->nodes[replaced_++]].task;
  if (old.name != task.name)
    throw Fault(kParameter, "softnpu: " + task.name + " where the task group has " + old.name);
  old = std::move(task);
}

void Stream::refuse_pageable(const char* who) {
  std::lock_guard lock(capture_lock());
  if (!capture_) return;
  capture_->spoilt = std::string(who) + " on captured stream " + std::to_string(id) +
                     ": host memory must be pinned (aclrtMallocHost)";
  throw Fault(kStreamCaptured, "softnpu: " + capture_->spoilt);
}

int Stream::capture_state(std::shared_ptr<Graph>* graph) {
  std::lock_guard lock(capture_lock());
  *graph = capture_;
  if (!capture_) return kCaptureNone;
  return capture_->spoilt.empty() ? kCaptureActive : kCaptureInvalid;
}

namespace {

// With chaos, a random order that respects the captured dependencies; without, the order of
// capture.
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
    if (!graph->ended) throw Fault(kModelCaptured, "softnpu: the graph is still being captured");
  }
  for (const size_t node : replay_order(*graph, chaos_seed())) {
    Task task = graph->nodes[node].task;
    task.run = [graph, node] { graph->nodes[node].task.run(); };
    push(std::move(task));
  }
}

}  // namespace softnpu
