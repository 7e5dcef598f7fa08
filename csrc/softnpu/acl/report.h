// What was called, what is alive, what went wrong: call counters, injected faults, error text,
// launch trace.
#pragma once

#include <atomic>
#include <cstdarg>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

namespace softnpu {

// One exported function. enter() counts the call and answers the code to fail with, or 0. A static
// Call needs neither constructor nor destructor at run time: a forked child may be the first to
// come to it while a lock of the C library that both would take is lost.
class SOFTNPU_CXX Call {
 public:
  explicit constexpr Call(const char* name, const char* suffix = "")
      : name_(name), suffix_(suffix) {}
  int enter();
  std::string name() const { return std::string(name_) + suffix_; }
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  const Call* next() const { return next_; }
  static const Call* all();  // that were entered

 private:
  const char *name_, *suffix_;
  const Call* next_ = nullptr;
  std::atomic<uint64_t> count_{0};
};

// First line of every exported function that returns an error code.
#define SOFTNPU_ENTER()                             \
  static constinit ::softnpu::Call call_{__func__}; \
  if (const int injected_ = call_.enter()) return injected_

// A kernel's or an argument's failure: becomes the return code, or the stream's error when it
// happens on the worker.
struct SOFTNPU_CXX Fault : std::runtime_error {
  Fault(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

// Stores the message as this thread's last error and returns the code.
SOFTNPU_CXX int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
SOFTNPU_CXX int fail(const Fault& fault);
// Fails in a forked child, kOk elsewhere. Comes before the first lock.
SOFTNPU_CXX int refuse_fork(const char* who);
// This thread's last error, in a buffer that stays where it is and changes only here: callers keep
// the pointer.
SOFTNPU_CXX const char* last_message();
SOFTNPU_CXX int last_code(bool clear);

// Things that must return to zero.
enum class Alive {
  kTensor,
  kTensorList,
  kScalar,
  kArray,
  kExecutor,
  kStream,
  kEvent,
  kDeviceMemory,
  kHostMemory,
  kGraph,
  kCount
};
SOFTNPU_CXX void alive(Alive what, int change);

struct SOFTNPU_CXX LaunchRecord {
  std::string name, arguments;
  int device, stream;
  uint64_t order, host_ns, start_ns, end_ns;
};

SOFTNPU_CXX uint64_t now_ns();
SOFTNPU_CXX bool tracing();
SOFTNPU_CXX void trace(LaunchRecord record);
SOFTNPU_CXX void count_launch(const std::string& name, uint64_t host_ns);
SOFTNPU_CXX void notice_idle_launch(const std::string& name);
SOFTNPU_CXX void notice_unreceived(const std::string& message);
// +1 when phase 1 has prepared a launch, -1 when phase 2 has been called for it.
SOFTNPU_CXX void count_prepared(const std::string& name, int change);
// What was prepared and never launched, one line; empty when nothing was.
SOFTNPU_CXX std::string unlaunched();
// Why a trace could not be written to `path`; empty when it could.
SOFTNPU_CXX std::string trace_obstacle(const std::string& path);
// %p is the process id. A file that another process has written is kept: x.json becomes x.PID.json.
SOFTNPU_CXX int write_trace(const std::string& path);
SOFTNPU_CXX std::string statistics(
    const std::string& memory);  // JSON; `memory` is a JSON object too

}  // namespace softnpu
