#include "report.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

#include "config.h"
#include "faults.h"
#include "fork.h"

namespace softnpu {
namespace {

struct Totals {
  uint64_t launches = 0, host_ns = 0;
};

struct Board {
  std::mutex mutex;
  std::atomic<int64_t> alive[static_cast<int>(Alive::kCount)] = {};
  std::map<std::string, Totals> launches;
  std::map<std::string, int64_t> idle, prepared, unreceived;
  std::vector<LaunchRecord> records;
  std::map<std::string, std::string>
      trace_files;  // what this process was asked to write -> what it writes
};

Board& board() {
  static auto* const instance = new Board;
  return *instance;
}

constexpr size_t kMessageRoom = 2048;
thread_local char thread_message[kMessageRoom], shown_message[kMessageRoom];
thread_local int thread_code = 0;

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= ' ') {
      result += c;
      continue;
    }
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
    result += escaped;
  }
  return result + "\"";
}

const char* const kAliveNames[] = {
    "tensors", "tensor_lists",       "scalars",          "arrays", "executors", "streams",
    "events",  "device_allocations", "host_allocations", "graphs"};

std::atomic<const Call*> newest_call{nullptr};

}  // namespace

const Call* Call::all() { return newest_call.load(std::memory_order_acquire); }

int Call::enter() {
  if (forked()) return refuse_fork(name().c_str());
  if (count_.fetch_add(1, std::memory_order_relaxed) == 0) {
    next_ = newest_call.load(std::memory_order_relaxed);
    while (!newest_call.compare_exchange_weak(next_, this, std::memory_order_release,
                                              std::memory_order_relaxed)) {
    }
  }
  if (!faults_planned()) return kOk;
  const int code = planned_fault(name());
  return code ? fail(code, "softnpu: injected fault %d in %s", code, name().c_str()) : kOk;
}

int fail(int code, const char* format, ...) {
  char text[kMessageRoom];  // an argument may point into thread_message
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::memcpy(thread_message, text, sizeof text);
  thread_code = code;
  return code;
}

int fail(const Fault& fault) { return fail(fault.code, "%s", fault.what()); }

int refuse_fork(const char* who) {
  if (!forked()) return kOk;
  return fail(kNnRuntime,
              "softnpu: %s: this process was forked from one that uses the device: spawn it", who);
}

const char* last_message() {
  std::memcpy(shown_message, thread_message, sizeof shown_message);
  return shown_message;
}

int last_code(bool clear) {
  const int code = thread_code;
  if (clear) thread_code = 0;
  return code;
}

void alive(Alive what, int change) {
  board().alive[static_cast<int>(what)].fetch_add(change, std::memory_order_relaxed);
}

uint64_t now_ns() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

bool tracing() {
  static const bool on = !config().trace.empty();
  return on;
}

void trace(LaunchRecord record) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  b.records.push_back(std::move(record));
}

void count_launch(const std::string& name, uint64_t host_ns) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  Totals& totals = b.launches[name];
  totals.launches++;
  totals.host_ns += host_ns;
}

void notice_idle_launch(const std::string& name) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  if (b.idle[name]++ == 0)
    std::fprintf(stderr, "softnpu: launch of %s wrote none of its outputs\n", name.c_str());
}

void notice_unreceived(const std::string& message) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  if (b.unreceived[message]++ == 0)
    std::fprintf(stderr, "softnpu: nobody has received %s\n", message.c_str());
}

void count_prepared(const std::string& name, int change) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  b.prepared[name] += change;
}

std::string unlaunched() {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  std::string result;
  for (const auto& [name, count] : b.prepared)
    if (count > 0) result += (result.empty() ? "" : ", ") + std::to_string(count) + " of " + name;
  return result.empty() ? result : "softnpu: prepared by phase 1 and never launched: " + result;
}

namespace {

std::string expanded(std::string path) {
  const std::string process = std::to_string(getpid());
  for (size_t at = path.find("%p"); at != std::string::npos;
       at = path.find("%p", at + process.size()))
    path.replace(at, 2, process);
  return path;
}

// The file that this process writes for `path`: the first process to come takes the name itself.
std::string trace_file(Board& b, const std::string& path) {
  const std::string target = expanded(path), process = std::to_string(getpid());
  std::string& taken = b.trace_files[process + ":" + target];  // a forked child is another process
  if (!taken.empty()) return taken;
  struct stat status;
  const int file = open(target.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
  if (file >= 0) close(file);
  if (file >= 0 || errno != EEXIST || stat(target.c_str(), &status) != 0 ||
      !S_ISREG(status.st_mode))
    return file >= 0 ? taken = target
                     : target;  // a pipe or device is written as it is, a fault is met on opening
  const size_t name = target.rfind('/') + 1, dot = target.rfind('.');  // npos + 1 == 0
  const size_t suffix = dot == std::string::npos || dot <= name ? target.size() : dot;
  taken = target.substr(0, suffix) + "." + process + target.substr(suffix);
  std::fprintf(stderr, "softnpu: %s exists: this process writes its trace to %s\n", target.c_str(),
               taken.c_str());
  return taken;
}

int cannot_write(const std::string& target) {
  const int error = errno;
  return fail(kAclParameter, "softnpu: cannot write trace %s: %s", target.c_str(),
              std::strerror(error));
}

}  // namespace

std::string trace_obstacle(const std::string& path) {
  const std::string target = expanded(path);
  const size_t slash = target.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : target.substr(0, slash + 1);
  struct stat status;
  const bool exists = stat(target.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode))
    return "softnpu: cannot write trace " + target + ": it is a folder";
  if ((exists && !S_ISREG(status.st_mode)) || access(folder.c_str(), W_OK | X_OK) == 0) return "";
  return "softnpu: cannot write trace " + target + ": " + std::strerror(errno);
}

int write_trace(const std::string& path) {
  if (!tracing())
    return fail(kAclParameter,
                "softnpu: nothing was traced: set SOFTNPU_TRACE before the device starts");
  Board& b = board();
  std::lock_guard lock(b.mutex);
  const std::string target = trace_file(b, path);
  std::FILE* file = std::fopen(target.c_str(), "w");
  if (!file) return cannot_write(target);
  std::fprintf(file, "{\"traceEvents\":[");
  const char* separator = "\n";
  for (const LaunchRecord& r : b.records) {
    std::fprintf(file,
                 "%s{\"name\":%s,\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,"
                 "\"args\":{\"order\":%lu,\"arguments\":%s,\"host_us\":%.3f}}",
                 separator, quoted(r.name).c_str(), r.device, r.stream,
                 static_cast<double>(r.start_ns) / 1e3,
                 static_cast<double>(r.end_ns - r.start_ns) / 1e3,
                 static_cast<unsigned long>(r.order), quoted(r.arguments).c_str(),
                 static_cast<double>(r.host_ns) / 1e3);
    separator = ",\n";
  }
  std::fprintf(file, "\n],\"summary\":{");
  separator = "\n";
  for (const auto& [name, totals] : b.launches) {
    std::fprintf(file, "%s%s:{\"launches\":%lu,\"host_us\":%.3f}", separator, quoted(name).c_str(),
                 static_cast<unsigned long>(totals.launches),
                 static_cast<double>(totals.host_ns) / 1e3);
    separator = ",\n";
  }
  std::fprintf(file, "\n}}\n");
  return std::fclose(file) == 0 ? kOk : cannot_write(target);
}

namespace {

template <class Counts>
void write_counts(std::ostringstream& out, const char* key, const Counts& counts) {
  const char* separator = "";
  out << ",\"" << key << "\":{";
  for (const auto& [name, count] : counts)
    if (count) out << separator << quoted(name) << ":" << count, separator = ",";
  out << "}";
}

void write_names(std::ostringstream& out, const char* key, const std::vector<std::string>& names) {
  const char* separator = "";
  out << ",\"" << key << "\":[";
  for (const auto& name : names) out << separator << quoted(name), separator = ",";
  out << "]";
}

}  // namespace

std::string statistics(const std::string& memory) {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  std::ostringstream out;
  out << "{\"alive\":{";
  for (int i = 0; i < static_cast<int>(Alive::kCount); ++i)
    out << (i ? "," : "") << quoted(kAliveNames[i]) << ":" << b.alive[i].load();
  out << "},\"launches\":{";
  const char* separator = "";
  for (const auto& [name, totals] : b.launches) {
    out << separator << quoted(name) << ":{\"launches\":" << totals.launches
        << ",\"host_ns\":" << totals.host_ns << "}";
    separator = ",";
  }
  out << "}";
  std::map<std::string, uint64_t> calls;
  for (const Call* call = Call::all(); call; call = call->next())
    calls[call->name()] += call->count();
  write_counts(out, "calls", calls);
  write_counts(out, "idle_launches", b.idle);
  write_counts(out, "unlaunched", b.prepared);
  write_counts(out, "unreceived", b.unreceived);
  write_names(out, "fired", fired_faults());
  write_names(out, "planned", waiting_faults());
  out << ",\"memory\":" << memory << "}";
  return out.str();
}

}  // namespace softnpu
