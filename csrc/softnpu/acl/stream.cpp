#include "stream.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

#include "config.h"
#include "device.h"
#include "faults.h"
#include "fork.h"
#include "report.h"

namespace softnpu {
namespace {

std::atomic<int> next_stream{0};

struct Streams {
  std::mutex mutex;
  std::unordered_map<Handle, std::shared_ptr<Stream>> all;
  std::unordered_map<int, std::shared_ptr<Stream>> defaults;
  std::unordered_map<int, std::vector<std::shared_ptr<Failure>>>
      orphans;  // faults of destroyed streams, by device
};

Streams& streams() {
  static auto* const instance = new Streams;
  return *instance;
}

struct Chaos {
  std::atomic<uint64_t> seed{0};
  std::atomic<uint64_t> tasks{0};
  std::atomic<uint64_t> workers{
      0};  // streams that have a thread, numbered in order of their first task
};

Chaos& chaos() {
  static auto* const instance = [] {
    auto* result = new Chaos;
    result->seed = config().chaos;
    return result;
  }();
  return *instance;
}

// Every 16 tasks another stream (or none) is the slow one; its tasks start 0.2 to 1 ms late.
void delay(uint64_t worker) {
  const uint64_t seed = chaos().seed.load(std::memory_order_relaxed);
  if (!seed) return;
  const uint64_t epoch = chaos().tasks.fetch_add(1) / 16;
  const uint64_t draw = mix(seed * 1000003 + epoch);
  if (draw % (chaos().workers.load() + 1) == worker)
    std::this_thread::sleep_for(std::chrono::microseconds(200 + draw / 7 % 800));
}

// Allowed, and nothing to wait for; but torch_npu only waits for events that it has recorded.
void notice_empty_wait(int stream) {
  static std::once_flag once;
  std::call_once(once, [&] {
    std::fprintf(stderr,
                 "softnpu: stream %d was told to wait for an event that is not recorded yet: it "
                 "does not wait\n",
                 stream);
  });
}

}  // namespace

std::mutex& capture_lock() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15ull;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

uint64_t chaos_seed() { return chaos().seed.load(); }

int Failure::report() {
  if (reported.exchange(true)) return kOk;
  std::fprintf(stderr, "softnpu: %s\n",
               text.c_str());  // torch_npu does not pass the text on from every synchronise
  return fail(code, "%s", text.c_str());
}

void set_chaos(uint64_t seed) {
  chaos().seed = seed;
  chaos().tasks = 0;
}

Stream::Stream(int device, uint32_t flags) : id(next_stream++), device(device), flags(flags) {
  alive(Alive::kStream, 1);
}

Stream::~Stream() {
  stop();
  alive(Alive::kStream, -1);
}

std::shared_ptr<Failure> Stream::stop() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (worker_.joinable() && worker_.get_id() == std::this_thread::get_id())
    worker_.detach();
  else if (worker_.joinable())
    worker_.join();
  return failure();
}

std::shared_ptr<Failure> Stream::failure() {
  std::lock_guard lock(mutex_);
  if (failure_ && failure_->reported) failure_.reset();
  return failure_;
}

void Stream::push(Task task) {
  {
    std::lock_guard lock(capture_lock());
    if (capture_) {
      const size_t member = member_of(*capture_);
      Clock& clock = capture_->clocks[member];
      const Clock before = clock;
      clock.resize(std::max(clock.size(), member + 1));
      clock[member]++;
      if (group_ && !task.control) group_->nodes.push_back(capture_->nodes.size());
      capture_->nodes.push_back({std::move(task), member, before});
      return;
    }
    if (updated_ && !task.control) return replace(std::move(task));
  }
  enqueue(std::move(task));
}

void Stream::enqueue(Task task) {
  {
    std::lock_guard lock(mutex_);
    if (closing_) throw Fault(kHandle, "softnpu: stream " + std::to_string(id) + " was destroyed");
    if (!worker_.joinable()) watch_forks(), worker_ = std::thread(&Stream::work, this);
    queue_.push_back(std::move(task));
    pushed_++;
  }
  changed_.notify_all();
}

void Stream::work() {
  const uint64_t worker = chaos().workers.fetch_add(1);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Task task = std::move(queue_.front());
    queue_.pop_front();
    const bool skip = failure_ && !failure_->reported && stop_on_failure && !task.control;
    lock.unlock();
    delay(worker);
    if (!skip)
      run(task);
    else if (task.failed)
      task.failed("skipped: its stream has a fault");
    task = Task();  // what it holds is gone before a waiter learns that it is done
    lock.lock();
    finished_++;
    changed_.notify_all();
  }
}

void Stream::run(const Task& task) {
  static std::atomic<uint64_t> launches{0};
  const uint64_t start = now_ns();
  int code = kOk;
  std::string problem;
  try {
    if (const int injected = injected_kernel_fault(task.name))
      throw Fault(injected, "softnpu: injected fault in kernel " + task.name);
    task.run();
  } catch (const Fault& fault) {
    code = fault.code, problem = fault.what();
  } catch (const std::exception& error) {
    code = kKernelFault, problem = error.what();
  }
  if (tracing() && !task.control)
    trace({task.name, task.arguments, device, id, launches++, task.host_ns, start, now_ns()});
  if (!code) return;
  if (task.failed) task.failed(problem);
  if (failure()) return;
  std::lock_guard lock(mutex_);
  failure_ = std::make_shared<Failure>(
      code, task.name + " on stream " + std::to_string(id) + ": " + problem);
}

int Stream::synchronise(int timeout_ms) {
  {
    std::lock_guard lock(capture_lock());
    if (capture_)  // refused, and the capture goes on
      return fail(kStreamCaptured, "softnpu: stream %d is captured: it cannot be synchronised", id);
  }
  std::unique_lock lock(mutex_);
  const uint64_t target = pushed_;
  if (!wait_until(changed_, lock, timeout_ms, [&] { return finished_ >= target; }))
    return fail(kTimeout, "softnpu: stream %d did not finish within %d ms", id, timeout_ms);
  lock.unlock();
  const auto found = failure();
  return found ? found->report() : kOk;
}

bool Stream::idle() {
  std::shared_ptr<Graph> graph;
  if (capture_state(&graph) != kCaptureNone)
    throw Fault(kStreamCaptured,
                "softnpu: stream " + std::to_string(id) + " is being captured: it cannot be asked");
  std::lock_guard lock(mutex_);
  return finished_ == pushed_;
}

void Stream::record(const std::shared_ptr<Event>& event) {
  if (const auto signal = event->external) {
    return push({"record_event",
                 [signal] {
                   std::lock_guard lock(signal->mutex);
                   signal->set = true;
                   signal->changed.notify_all();
                 },
                 true});
  }
  const auto record = std::make_shared<Record>();
  {
    std::lock_guard lock(capture_lock());
    std::lock_guard event_lock(event->mutex);
    event->graph = capture_;
    if (capture_) {
      event->clock = capture_->clocks[member_of(*capture_)];
      return;
    }
    event->latest = record;
  }
  enqueue({"record_event",
           [this, record] {
             const auto found = failure();
             std::lock_guard lock(record->mutex);
             record->done = true;
             record->failure = found;
             record->time_ns = now_ns();
             record->changed.notify_all();
           },
           true});
}

void Stream::reset(const std::shared_ptr<Event>& event) {
  push({"reset_event",
        [signal = event->external] {
          std::lock_guard lock(signal->mutex);
          signal->set = false;
        },
        true});
}

void Stream::wait(const std::shared_ptr<Event>& event) {
  if (const auto signal = event->external) {
    return push({"wait_event",
                 [signal] {
                   std::unique_lock lock(signal->mutex);
                   signal->changed.wait(lock, [&] { return signal->set; });
                 },
                 true});
  }
  std::shared_ptr<Record> record;
  {
    std::lock_guard lock(capture_lock());
    std::lock_guard event_lock(event->mutex);
    if (const auto graph = event->graph.lock(); graph && !graph->ended) {
      capture_join(*this, graph, event->clock);
      return;
    }
    record = event->latest;
    if (capture_ && record)
      throw Fault(kCaptureDependency,
                  "softnpu: captured stream " + std::to_string(id) +
                      " waits for an event that was recorded outside the capture");
  }
  if (!record) return notice_empty_wait(id);
  enqueue({"wait_event",
           [this, record] {
             std::unique_lock lock(record->mutex);
             record->changed.wait(lock, [&] { return record->done; });
             if (!record->failure || failure()) return;
             std::lock_guard own(mutex_);
             failure_ = record->failure;
           },
           true});
}

Handle add_stream(int device, uint32_t flags) {
  auto stream = std::make_shared<Stream>(device, flags);
  std::lock_guard lock(streams().mutex);
  streams().all[stream.get()] = stream;
  return stream.get();
}

std::shared_ptr<Stream> find_stream(Handle handle, int device) {
  if (device < 0) device = require_device();
  if (!handle) refuse_default_stream(device);
  std::lock_guard lock(streams().mutex);
  if (!handle) {
    auto& stream = streams().defaults[device];
    if (!stream) stream = std::make_shared<Stream>(device, 0);
    return stream;
  }
  const auto found = streams().all.find(handle);
  if (found == streams().all.end()) throw Fault(kHandle, "softnpu: not a live stream");
  if (found->second->device != device)
    throw Fault(kStreamContext, "softnpu: stream " + std::to_string(found->second->id) +
                                    " belongs to device " + std::to_string(found->second->device) +
                                    ", the thread's device is " + std::to_string(device));
  return found->second;
}

void remove_stream(Handle handle) {
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard lock(streams().mutex);
    const auto found = streams().all.find(handle);
    if (found == streams().all.end())
      throw Fault(kHandle, "softnpu: not a live stream (destroyed twice?)");
    std::shared_ptr<Graph> graph;
    if (found->second->capture_state(&graph) != kCaptureNone)
      throw Fault(kStreamCaptured, "softnpu: stream " + std::to_string(found->second->id) +
                                       " is being captured: end that before it is destroyed");
    stream = found->second;
    streams().all.erase(found);
  }
  if (auto orphan = stream->stop()) {
    std::lock_guard lock(streams().mutex);
    streams().orphans[stream->device].push_back(std::move(orphan));
  }
}

int synchronise_device(int device, int timeout_ms) {
  std::vector<std::shared_ptr<Stream>> mine;
  std::vector<std::shared_ptr<Failure>> orphans;
  {
    std::lock_guard lock(streams().mutex);
    for (const auto& [handle, stream] : streams().all)
      if (stream->device == device) mine.push_back(stream);
    if (const auto found = streams().defaults.find(device); found != streams().defaults.end())
      mine.push_back(found->second);
    orphans.swap(streams().orphans[device]);
  }
  int code = kOk;
  for (const auto& orphan : orphans) {
    const int own = orphan->report();
    if (code == kOk) code = own;
  }
  for (const auto& stream : mine) {
    const int own = stream->synchronise(timeout_ms);
    if (code == kOk) code = own;
  }
  return code;
}

}  // namespace softnpu
