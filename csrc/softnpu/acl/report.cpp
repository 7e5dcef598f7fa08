#include "report.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>

#include "config.h"
#include "memory.h"

namespace softnpu {
namespace {

struct Planned {
  std::string call;
  uint64_t left;  // uses before the failing one
  int code;
};

struct Totals {
  uint64_t launches = 0, host_ns = 0;
};

struct Board {
  std::mutex mutex;
  std::vector<Call*> calls;
  std::vector<Planned> planned;
  std::atomic<bool> armed{false};
  std::atomic<int64_t> alive[static_cast<int>(Alive::kCount)] = {};
  std::map<std::string, Totals> launches;
  std::map<std::string, int64_t> idle, prepared;
  std::vector<LaunchRecord> records;
  std::vector<std::string> fired;
};

std::string parse(const std::string& spec, Planned* result) {
  const size_t first = spec.find(':'), second = spec.find(':', first == std::string::npos ? first : first + 1);
  if (second == std::string::npos) return "fault '" + spec + "' is not CALL:N:CODE";
  char *end_n = nullptr, *end_code = nullptr;
  const long n = std::strtol(spec.c_str() + first + 1, &end_n, 10);
  const long code = std::strtol(spec.c_str() + second + 1, &end_code, 10);
  if (n < 1 || end_n != spec.c_str() + second || code == 0 || *end_code)
    return "fault '" + spec + "': N >= 1 and CODE != 0";
  *result = {spec.substr(0, first), static_cast<uint64_t>(n - 1), static_cast<int>(code)};
  return "";
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
        std::abort();
      }
      result->armed = !result->planned.empty();
    }
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

thread_local std::string thread_message;
thread_local int thread_code = 0;

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c == '\n' ? ' ' : c;
  }
  return result + "\"";
}

const char* const kAliveNames[] = {"tensors",          "tensor_lists", "scalars", "arrays",
                                   "executors",        "streams",      "events",  "device_allocations",
                                   "host_allocations", "graphs"};

}  // namespace

Call::Call(std::string name) : name_(std::move(name)) {
  std::lock_guard lock(board().mutex);
  board().calls.push_back(this);
}

int Call::enter() {
  count_.fetch_add(1, std::memory_order_relaxed);
  const int code = use(name_);
  return code ? fail(code, "softnpu: injected fault %d in %s", code, name_.c_str()) : 0;
}

int fail(int code, const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  thread_message = text;
  thread_code = code;
  return code;
}

int fail(const Fault& fault) { return fail(fault.code, "%s", fault.what()); }

const char* last_message() { return thread_message.c_str(); }

int last_code(bool clear) {
  const int code = thread_code;
  if (clear) thread_code = 0;
  return code;
}

bool inject(const std::string& specs, std::string* problem) {
  std::vector<Planned> planned;
  *problem = parse_all(specs, &planned);
  if (!problem->empty()) return false;
  Board& b = board();
  std::lock_guard lock(b.mutex);
  b.planned = planned;
  b.fired.clear();
  b.armed = !b.planned.empty();
  return true;
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

int write_trace(const std::string& path) {
  std::string target = path;
  if (const size_t at = target.find("%p"); at != std::string::npos) target.replace(at, 2, std::to_string(getpid()));
  std::FILE* file = std::fopen(target.c_str(), "w");
  if (!file) return fail(kAclParameter, "softnpu: cannot write trace %s", target.c_str());
  Board& b = board();
  std::lock_guard lock(b.mutex);
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
  return std::fclose(file) == 0 ? kOk : fail(kAclParameter, "softnpu: cannot write trace %s", target.c_str());
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
  for (const Call* call : b.calls) calls[call->name()] += call->count();
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
