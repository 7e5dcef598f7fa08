#include "report.h"

#include <dlfcn.h>
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
#include "fork.h"
#include "memory.h"
#include "number.h"

namespace softnpu {
namespace {

constexpr int kUsage = 2;  // exit code of dsv4-ascend for it

struct Planned {
  std::string spec, call;
  uint64_t left;  // uses before the failing one
  int code;
  bool named = false;  // as never fired
};

struct Totals {
  uint64_t launches = 0, host_ns = 0;
};

struct Board {
  std::mutex mutex;
  std::vector<Planned> planned;
  std::atomic<bool> armed{false};
  std::atomic<int64_t> alive[static_cast<int>(Alive::kCount)] = {};
  std::map<std::string, Totals> launches;
  std::map<std::string, int64_t> idle, prepared;
  std::vector<LaunchRecord> records;
  std::vector<std::string> fired;
  std::map<std::string, std::string> trace_files;  // what this process was asked to write -> what it writes
};

std::string parse(const std::string& spec, Planned* result) {
  const size_t first = spec.find(':'), second = spec.find(':', first == std::string::npos ? first : first + 1);
  if (second == std::string::npos || first == 0) return "fault '" + spec + "' is not CALL:N:CODE";
  const std::string call = spec.substr(0, first), n = spec.substr(first + 1, second - first - 1);
  const size_t at = std::min(call.find('@'), call.size());
  if (at < call.size() && call.substr(at) != "@kernel" && call.substr(at) != "@idle")
    return "fault '" + spec + "': '" + call.substr(at) + "' found, '@kernel' or '@idle' expected";
  uint64_t use = 0;
  if (!number(n, &use) || use < 1) return "fault '" + spec + "': N is '" + n + "', an integer >= 1 expected";
  int32_t code = 0;
  if (!number(spec.substr(second + 1), &code) || code == 0)
    return "fault '" + spec + "': CODE is '" + spec.substr(second + 1) + "', an integer of 32 bits, not 0, expected";
  *result = {spec, call, use - 1, code};
  return "";
}

// acl* functions live in this library, so that a wrong name is known now; operators may be loaded later.
void name_unknown(const std::vector<Planned>& planned) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&name_unknown), &self)) return;
  void* const library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return;
  for (const Planned& plan : planned)
    if (plan.call.rfind("acl", 0) == 0 && plan.call.rfind("aclnn", 0) != 0 && !dlsym(library, plan.call.c_str()) &&
        plan.call.find('@') == std::string::npos)
      std::fprintf(stderr, "softnpu: planned fault %s: there is no function %s\n", plan.spec.c_str(),
                   plan.call.c_str());
  dlclose(library);
}

std::string parse_all(const std::string& specs, std::vector<Planned>* result) {
  std::istringstream stream(specs);
  for (std::string spec; std::getline(stream, spec, ',');) {
    Planned planned;
    if (std::string problem = parse(spec, &planned); !problem.empty()) return problem;
    result->push_back(planned);
  }
  return "";
}

Board& board() {
  static Board* const instance = [] {
    auto* result = new Board;
    if (const char* specs = std::getenv("SOFTNPU_FAIL")) {
      const std::string problem = parse_all(specs, &result->planned);
      if (!problem.empty()) {
        std::fprintf(stderr, "softnpu: SOFTNPU_FAIL: %s\n", problem.c_str());
        std::_Exit(kUsage);  // no destructors: other threads may be inside the runtime
      }
      name_unknown(result->planned);
      result->armed = !result->planned.empty();
    }
    std::atexit(report_unfired);
    return result;
  }();
  return *instance;
}

// The code planned for this use of `name`, counting the use; 0 = none.
int use(const std::string& name) {
  Board& b = board();
  if (!b.armed.load(std::memory_order_acquire)) return 0;
  std::lock_guard lock(b.mutex);
  int code = 0;
  for (auto plan = b.planned.begin(); plan != b.planned.end();) {
    if (plan->call == name && plan->left-- == 0) {
      code = plan->code;
      b.fired.push_back(name);
      plan = b.planned.erase(plan);
    } else {
      ++plan;
    }
  }
  b.armed = !b.planned.empty();
  return code;
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

const char* const kAliveNames[] = {"tensors",          "tensor_lists", "scalars", "arrays",
                                   "executors",        "streams",      "events",  "device_allocations",
                                   "host_allocations", "graphs"};

std::atomic<const Call*> newest_call{nullptr};

}  // namespace

Call::Call(std::string name) : name_(std::move(name)), next_(newest_call.load(std::memory_order_relaxed)) {
  while (!newest_call.compare_exchange_weak(next_, this, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

const Call* Call::all() { return newest_call.load(std::memory_order_acquire); }

int Call::enter() {
  if (const int refused = refuse_fork(name_.c_str())) return refused;
  count_.fetch_add(1, std::memory_order_relaxed);
  const int code = use(name_);
  return code ? fail(code, "softnpu: injected fault %d in %s", code, name_.c_str()) : 0;
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
  return fail(kNnRuntime, "softnpu: %s: this process was forked from one that uses the device: spawn it", who);
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

std::string fault_problem(const std::string& specs) {
  std::vector<Planned> ignored;
  return parse_all(specs, &ignored);
}

bool inject(const std::string& specs, std::string* problem) {
  std::vector<Planned> planned;
  *problem = parse_all(specs, &planned);
  if (!problem->empty()) return false;
  name_unknown(planned);
  Board& b = board();
  std::lock_guard lock(b.mutex);
  b.planned = planned;
  b.fired.clear();
  b.armed = !b.planned.empty();
  return true;
}

void report_unfired() {
  if (forked()) return;
  Board& b = board();
  std::lock_guard lock(b.mutex);
  for (Planned& plan : b.planned)
    if (!std::exchange(plan.named, true))
      std::fprintf(stderr, "softnpu: planned fault %s never fired\n", plan.spec.c_str());
}

int injected_kernel_fault(const std::string& name) {
  return board().armed.load(std::memory_order_acquire) ? use(name + "@kernel") : 0;
}

bool injected_idleness(const std::string& name) {
  return board().armed.load(std::memory_order_acquire) && use(name + "@idle");
}

void alive(Alive what, int change) {
  board().alive[static_cast<int>(what)].fetch_add(change, std::memory_order_relaxed);
}

uint64_t now_ns() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
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
  if (b.idle[name]++ == 0) std::fprintf(stderr, "softnpu: launch of %s wrote none of its outputs\n", name.c_str());
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
  for (size_t at = path.find("%p"); at != std::string::npos; at = path.find("%p", at + process.size()))
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
  if (file >= 0 || errno != EEXIST || stat(target.c_str(), &status) != 0 || !S_ISREG(status.st_mode))
    return file >= 0 ? taken = target : target;  // a pipe or device is written as it is, a fault is met on opening
  const size_t name = target.rfind('/') + 1, dot = target.rfind('.');  // npos + 1 == 0
  const size_t suffix = dot == std::string::npos || dot <= name ? target.size() : dot;
  taken = target.substr(0, suffix) + "." + process + target.substr(suffix);
  std::fprintf(stderr, "softnpu: %s exists: this process writes its trace to %s\n", target.c_str(), taken.c_str());
  return taken;
}

int cannot_write(const std::string& target) {
  const int error = errno;
  return fail(kAclParameter, "softnpu: cannot write trace %s: %s", target.c_str(), std::strerror(error));
}

}  // namespace

std::string trace_obstacle(const std::string& path) {
  const std::string target = expanded(path);
  const size_t slash = target.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : target.substr(0, slash + 1);
  struct stat status;
  const bool exists = stat(target.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) return "softnpu: cannot write trace " + target + ": it is a folder";
  if ((exists && !S_ISREG(status.st_mode)) || access(folder.c_str(), W_OK | X_OK) == 0) return "";
  return "softnpu: cannot write trace " + target + ": " + std::strerror(errno);
}

int write_trace(const std::string& path) {
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
                 separator, quoted(r.name).c_str(), r.device, r.stream, static_cast<double>(r.start_ns) / 1e3,
                 static_cast<double>(r.end_ns - r.start_ns) / 1e3, static_cast<unsigned long>(r.order),
                 quoted(r.arguments).c_str(), static_cast<double>(r.host_ns) / 1e3);
    separator = ",\n";
  }
  std::fprintf(file, "\n],\"summary\":{");
  separator = "\n";
  for (const auto& [name, totals] : b.launches) {
    std::fprintf(file, "%s%s:{\"launches\":%lu,\"host_us\":%.3f}", separator, quoted(name).c_str(),
                 static_cast<unsigned long>(totals.launches), static_cast<double>(totals.host_ns) / 1e3);
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

}  // namespace

std::string statistics() {
  Board& b = board();
  std::lock_guard lock(b.mutex);
  std::ostringstream out;
  out << "{\"alive\":{";
  for (int i = 0; i < static_cast<int>(Alive::kCount); ++i)
    out << (i ? "," : "") << quoted(kAliveNames[i]) << ":" << b.alive[i].load();
  out << "},\"launches\":{";
  const char* separator = "";
  for (const auto& [name, totals] : b.launches) {
    out << separator << quoted(name) << ":{\"launches\":" << totals.launches << ",\"host_ns\":" << totals.host_ns
        << "}";
    separator = ",";
  }
  out << "}";
  std::map<std::string, uint64_t> calls;
  for (const Call* call = Call::all(); call; call = call->next()) calls[call->name()] += call->count();
  write_counts(out, "calls", calls);
  write_counts(out, "idle_launches", b.idle);
  write_counts(out, "unlaunched", b.prepared);
  out << ",\"fired\":[";
  separator = "";
  for (const auto& name : b.fired) out << separator << quoted(name), separator = ",";
  out << "],\"memory\":" << memory_statistics() << "}";
  return out.str();
}

}  // namespace softnpu
