// What was called, what is alive, what went wrong: call counters, injected faults, error text, launch trace.
#pragma once

#include <atomic>
#include <cstdarg>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

namespace softnpu {

// One exported function. enter() counts the call and answers the code to fail with, or 0.
class SOFTNPU_CXX Call {
 public:
  explicit Call(std::string name);  // takes no lock: a forked child may be the first to come here
  int enter();
  const std::string& name() const { return name_; }
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  const Call* next() const { return next_; }
  static const Call* all();

 private:
  std::string name_;
  const Call* next_ = nullptr;
  std::atomic<uint64_t> count_{0};
};

// First line of every exported function that returns an error code.
#define SOFTNPU_ENTER()                   \
  static ::softnpu::Call call_{__func__}; \
  if (const int injected_ = call_.enter()) return injected_

// A kernel's or an argument's failure: becomes the return code, or the stream's error when it happens on the worker.
struct SOFTNPU_CXX Fault : std::runtime_error {
  Fault(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

// Stores the message as this thread's last error and returns the code.
SOFTNPU_CXX int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
SOFTNPU_CXX int fail(const Fault& fault);
// Fails in a forked child, kOk elsewhere. Comes before the first lock.
SOFTNPU_CXX int refuse_fork(const char* who);
// This thread's last error, in a buffer that stays where it is and changes only here: callers keep the pointer.
SOFTNPU_CXX const char* last_message();
SOFTNPU_CXX int last_code(bool clear);

// "CALL:N:CODE", comma separated: the n-th use of CALL from now on answers CODE. CALL@kernel fails on the stream
// instead; CALL@idle is launched and does nothing.
SOFTNPU_CXX bool inject(const std::string& specs, std::string* problem);
// Why `specs` is refused; empty when it is taken.
std::string fault_problem(const std::string& specs);
// Names the planned faults that never fired on stderr, each one once.
SOFTNPU_CXX void report_unfired();
SOFTNPU_CXX int injected_kernel_fault(const std::string& name);
SOFTNPU_CXX bool injected_idleness(const std::string& name);

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
// +1 when phase 1 has prepared a launch, -1 when phase 2 has been called for it.
SOFTNPU_CXX void count_prepared(const std::string& name, int change);
// What was prepared and never launched, one line; empty when nothing was.
SOFTNPU_CXX std::string unlaunched();
// Why a trace could not be written to `path`; empty when it could.
SOFTNPU_CXX std::string trace_obstacle(const std::string& path);
// %p is the process id. A file that another process has written is kept: x.json becomes x.PID.json.
SOFTNPU_CXX int write_trace(const std::string& path);
SOFTNPU_CXX std::string statistics();

}  // namespace softnpu
