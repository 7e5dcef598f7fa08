// Streams are ordered queues, each with a worker thread that starts at its first task. Events count
// records. A captured stream appends its tasks to a graph instead of running them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

namespace softnpu {

class Stream;
struct Graph;

using Clock =
    std::vector<size_t>;  // per member of a graph: how many of its nodes come before this point

struct Task {
  std::string name;
  std::function<void()> run;   // throws Fault; may run many times (graph replay)
  bool control = false;        // event records and waits: no launch
  std::string arguments = {};  // for the trace
  uint64_t host_ns = 0;
  std::function<void(const std::string&)> failed =
      {};  // told why, when the task failed or was skipped
};

// A kernel's fault. It follows the events behind it to other streams; the first synchronise that
// meets it reports it.
struct Failure {
  int code;
  std::string text;
  std::atomic<bool> reported{false};
  int report();  // the code, once; kOk afterwards
};

// One record of an event: what a wait issued after it, and before the next record, waits for.
struct Record {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  uint64_t time_ns = 0;
  std::shared_ptr<Failure> failure;  // of the stream, when the record ran
};

enum EventFlag : uint32_t {
  kEventSync = 1,
  kEventProgress = 2,
  kEventTimeLine = 8,
  kEventExternal = 32,
};

// What an external event is: set by a record, waited for, and cleared by a reset, each by a task of
// its own, so that a graph can wait for work outside it at every replay.
struct Signal {
  std::mutex mutex;
  std::condition_variable changed;
  bool set = false;
};

struct Event {
  const uint32_t flags;
  const bool extended;  // by aclrtCreateEventExWithFlag
  std::mutex mutex;
  std::shared_ptr<Record> latest;    // null: never recorded
  std::shared_ptr<Signal> external;  // of ACL_EVENT_EXTERNAL only
  std::weak_ptr<Graph> graph;        // recorded inside this capture ...
  Clock clock;                       // ... at this point
  Event(uint32_t flags, bool extended);
  ~Event();
};

struct GraphNode {
  Task task;
  size_t member;
  Clock before;  // nodes of each member that must have run
};

// Tasks of a graph that can be replaced by others of the same operators.
struct TaskGroup {
  std::weak_ptr<Graph> graph;
  std::vector<size_t> nodes;
};

struct Graph {
  const uint32_t id;
  const int device, mode;
  const std::thread::id thread = std::this_thread::get_id();  // where the capture began
  std::vector<std::shared_ptr<Stream>> members;  // [0] is the stream on which the capture began
  std::vector<Clock> clocks;
  std::vector<GraphNode> nodes;
  std::string spoilt;  // why it ends with an error; empty: it is good
  bool ended = false;
  Graph(int device, int mode);
  ~Graph();
};

class SOFTNPU_CXX Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int device, uint32_t flags);
  ~Stream();
  void push(Task task);
  // Waits for all tasks pushed so far; answers and clears the stream's error. timeout_ms < 0: for
  // ever.
  int synchronise(int timeout_ms);
  bool idle();
  void record(const std::shared_ptr<Event>& event);
  void wait(const std::shared_ptr<Event>& event);
  int begin_capture(int mode);
  int end_capture(std::shared_ptr<Graph>* graph);
  int capture_state(std::shared_ptr<Graph>* graph);
  void refuse_pageable(
      const char* who);  // throws while it is captured: a graph copies pinned host memory only
  void replay(const std::shared_ptr<Graph>& graph);
  void reset(const std::shared_ptr<Event>& event);  // of an external event
  // Of the capture on this stream: what is pushed between the two belongs to the group.
  int begin_group();
  int end_group(std::shared_ptr<TaskGroup>* group);
  // What is pushed between the two replaces the group's tasks, one by one, and does not run.
  int begin_update(const std::shared_ptr<TaskGroup>& group);
  int end_update();
  std::shared_ptr<Failure>
  stop();  // finishes the queue and joins the worker; a fault that nobody has heard of

  const int id, device;
  const uint32_t flags;
  std::atomic<bool> stop_on_failure = false;

 private:
  friend void capture_join(Stream& stream, const std::shared_ptr<Graph>& graph, const Clock& clock);
  void work();
  void run(const Task& task);
  void enqueue(Task task);
  std::shared_ptr<Failure> failure();  // not reported yet
  size_t member_of(const Graph& graph) const;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> queue_;
  std::thread worker_;
  uint64_t pushed_ = 0, finished_ = 0;
  bool closing_ = false;
  std::shared_ptr<Failure> failure_;
  void replace(Task task);          // of the group that is updated; under the capture lock
  std::shared_ptr<Graph> capture_;  // guarded by the capture lock, as what follows
  std::shared_ptr<TaskGroup> group_, updated_;
  size_t replaced_ = 0;
};

SOFTNPU_CXX std::shared_ptr<Stream> find_stream(
    Handle handle,
    int device);  // nullptr handle: the device's default stream
SOFTNPU_CXX Handle add_stream(int device, uint32_t flags);
void remove_stream(Handle handle);  // throws Fault
int synchronise_device(int device, int timeout_ms);
int wait_event(Event& event, int timeout_ms);
// False: timeout_ms is over. timeout_ms < 0: for ever.
bool wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                int timeout_ms, const std::function<bool()>& ready);
bool happened(Event& event);  // throws Fault for a captured one
uint64_t time_of(Event& event);

std::mutex& capture_lock();  // guards every Graph and every Stream::capture_
void capture_join(Stream& stream, const std::shared_ptr<Graph>& graph,
                  const Clock& clock);  // under it
// Throws, and spoils the capture, when the mode of a capture on this thread's device forbids this
// thread a call that CANN names unsafe: synchronous copies and fills, asynchronous copies of
// pageable host memory.
void refuse_in_capture(const char* who);
void refuse_default_stream(int device);  // throws while a stream of the device is captured
int exchange_capture_mode(int mode);     // of this thread; answers the mode before
uint64_t mix(uint64_t value);
uint64_t chaos_seed();
// One stream at a time is delayed, chosen by the seed; 0 = off.
SOFTNPU_CXX void set_chaos(uint64_t seed);

}  // namespace softnpu
