// Initialisation, devices, contexts, identity, system options, error text.
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "config.h"
#include "device.h"
#include "faults.h"
#include "memory.h"
#include "number.h"
#include "report.h"
#include "stream.h"

namespace softnpu {
namespace {

constexpr int kMaxDevices = 32;

struct Context {
  std::atomic<bool> active{false};
  std::atomic<uint64_t> life{
      0};  // a thread that chose the device in an earlier life has no device now
  std::atomic<uint32_t> peers{0};  // bits of the devices whose memory it may reach
};

std::array<Context, kMaxDevices> contexts;
Context& context_of(int device) { return contexts.at(static_cast<size_t>(device)); }
std::atomic<bool> initialised{false};
std::array<std::atomic<int64_t>, 64> options;  // aclrtSetSysParamOpt
thread_local int thread_device = -1;
thread_local uint64_t thread_life = 0;

std::atomic<int> default_device{-1};  // set implicitly where a device is needed; -1: none

// "defaultDevice": {"default_device": "0"} of aclInit's file; -1 where it says nothing.
int default_of(const char* path) {
  std::ifstream file(path ? path : "");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t key = text.find("\"default_device\"");
  if (key == std::string::npos) return -1;
  const size_t begin = text.find('"', text.find(':', key));
  const size_t end = begin == std::string::npos ? begin : text.find('"', begin + 1);
  int device = -1;
  return end != std::string::npos && number(text.substr(begin + 1, end - begin - 1), &device)
             ? device
             : -1;
}

int known_device(int device) {
  if (device >= 0 && device < config().devices) return kOk;
  return fail(kDeviceId, "softnpu: device %d of %d", device, config().devices);
}

// torch_npu shows the code only: the reason goes to stderr, once.
int refuse_settings() {
  static const bool printed [[maybe_unused]] =
      std::fprintf(stderr, "softnpu: %s\n", config().problem.c_str()) > 0;
  return fail(kAclParameter, "softnpu: %s", config().problem.c_str());
}

}  // namespace

int current_device() {
  if (thread_device < 0 || context_of(thread_device).life != thread_life) return -1;
  return thread_device;
}

void set_current_device(int device) {
  thread_device = device;
  if (device >= 0) thread_life = context_of(device).life;
}

bool reaches(int device, int peer) {
  return device >= 0 && peer >= 0 && (context_of(device).peers >> peer & 1);
}

int require_device() {
  const int otherwise = default_device;
  if (current_device() < 0 && otherwise >= 0) {
    context_of(otherwise).active = true;
    set_current_device(otherwise);
  }
  if (current_device() < 0)
    throw Fault(
        kNoContext,
        "softnpu: no device was set on this thread (aclrtSetDevice), or it was reset since");
  return thread_device;
}

namespace {

void end_life(Context& context) {
  context.active = false;
  context.life++;
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclInit(const char* path) {
  SOFTNPU_ENTER();
  if (!config().problem.empty()) return refuse_settings();
  const int device = default_of(path);
  if (const int code = device < 0 ? kOk : known_device(device)) return code;
  if (initialised.exchange(true))
    return fail(kAlreadyInitialised, "softnpu: aclInit was called already");
  default_device = device;
  install_dereference_trap();
  if (!config().trace.empty())
    if (const std::string obstacle = trace_obstacle(config().trace); !obstacle.empty())
      std::fprintf(stderr, "%s\n", obstacle.c_str());
  return kOk;
}

SOFTNPU_C int aclFinalize() {
  SOFTNPU_ENTER();
  if (const std::string problem = check_red_zones(); !problem.empty())
    std::fprintf(stderr, "%s\n", problem.c_str());
  if (const std::string dropped = unlaunched(); !dropped.empty())
    std::fprintf(stderr, "%s\n", dropped.c_str());
  if (!config().trace.empty() && write_trace(config().trace) != kOk)
    std::fprintf(stderr, "%s\n", last_message());
  report_unfired();
  if (!initialised.exchange(false))
    return fail(kFinalisedAlready, "softnpu: aclFinalize before aclInit, or twice");
  default_device = -1;
  for (Context& context : contexts) end_life(context);
  return kOk;
}

SOFTNPU_C int aclrtGetDeviceCount(uint32_t* count) {
  SOFTNPU_ENTER();
  *count = static_cast<uint32_t>(config().devices);
  return kOk;
}

// Everything that needs a device needs aclInit through it; counts, versions and reserved addresses
// need neither.
SOFTNPU_C int aclrtSetDevice(int32_t device) {
  SOFTNPU_ENTER();
  if (!initialised)
    return fail(kNotInitialised, "softnpu: aclrtSetDevice before aclInit, or after aclFinalize");
  if (const int code = known_device(device)) return code;
  install_dereference_trap();
  context_of(device).active = true;
  set_current_device(device);
  return kOk;
}

SOFTNPU_C int aclrtGetDevice(int32_t* device) {
  SOFTNPU_ENTER();
  if (current_device() < 0) return fail(kNoContext, "softnpu: no device was set on this thread");
  *device = current_device();
  return kOk;
}

SOFTNPU_C int aclrtResetDevice(int32_t device) {
  SOFTNPU_ENTER();
  if (const int code = known_device(device)) return code;
  const int code = synchronise_device(device, -1);
  end_life(context_of(device));
  return code;
}

SOFTNPU_C int aclrtGetCurrentContext(Handle* context) {
  SOFTNPU_ENTER();
  if (current_device() < 0) return fail(kNoContext, "softnpu: no context on this thread");
  *context = &context_of(current_device());
  return kOk;
}

SOFTNPU_C int aclrtSetCurrentContext(Handle context) {
  SOFTNPU_ENTER();
  if (!initialised)
    return fail(kNotInitialised,
                "softnpu: aclrtSetCurrentContext before aclInit, or after aclFinalize");
  for (int device = 0; device < config().devices; ++device) {
    if (&context_of(device) == context) return set_current_device(device), kOk;
  }
  return fail(kHandle, "softnpu: not a context");
}

SOFTNPU_C int aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  SOFTNPU_ENTER();
  if (const int code = known_device(device)) return code;
  if (flags) *flags = 0;
  if (active) *active = context_of(device).active;
  return kOk;
}

SOFTNPU_C int aclrtSynchronizeDeviceWithTimeout(int32_t timeout) try {
  SOFTNPU_ENTER();
  const int code = synchronise_device(require_device(), timeout);
  if (code != kOk) return code;
  const std::string problem = check_red_zones();
  return problem.empty() ? kOk : fail(kWriteOutOfBounds, "%s", problem.c_str());
} catch (const Fault& fault) {
  return fail(fault);
}

SOFTNPU_C int aclrtSynchronizeDevice() try {
  SOFTNPU_ENTER();
  return synchronise_device(require_device(), -1);
} catch (const Fault& fault) {
  return fail(fault);
}

SOFTNPU_C int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  SOFTNPU_ENTER();
  *can = 1;
  return kOk;
}

SOFTNPU_C int aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) try {
  SOFTNPU_ENTER();
  if (const int code = known_device(peer)) return code;
  context_of(require_device()).peers |= uint32_t{1} << peer;
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

SOFTNPU_C int aclrtDeviceGetBareTgid(int32_t* pid) {
  SOFTNPU_ENTER();
  *pid = getpid();
  return kOk;
}

SOFTNPU_C const char* aclrtGetSocName() { return config().soc.c_str(); }

SOFTNPU_C int aclsysGetCANNVersion(
    int, char* version) {  // struct whose first member is char version[128]
  SOFTNPU_ENTER();
  std::snprintf(version, 128, "%s", config().cann.c_str());
  return kOk;
}

SOFTNPU_C int aclsysGetVersionStr(char*, char* version) {
  SOFTNPU_ENTER();
  std::snprintf(version, 64, "%s", config().cann.c_str());
  return kOk;
}

SOFTNPU_C int aclGetCannAttribute(int, int32_t* value) {
  SOFTNPU_ENTER();
  *value = 1;
  return kOk;
}

SOFTNPU_C size_t aclGetCompileoptSize(int) { return 8; }

SOFTNPU_C int aclGetCompileopt(int, char* value, size_t length) {
  SOFTNPU_ENTER();
  std::snprintf(value, length,
                "disable");  // asked about just-in-time compilation: aclnn operators need none
  return kOk;
}

SOFTNPU_C int aclSetCompileopt(int, const char*) {
  SOFTNPU_ENTER();
  return kOk;
}

namespace {

int get_option(int option, int64_t* value) {
  if (option < 0 || option >= static_cast<int>(options.size()))
    return fail(kParameter, "softnpu: system option %d", option);
  *value = options[static_cast<size_t>(option)];
  return kOk;
}

int set_option(int option, int64_t value) {
  if (option < 0 || option >= static_cast<int>(options.size()))
    return fail(kParameter, "softnpu: system option %d", option);
  options[static_cast<size_t>(option)] = value;
  return kOk;
}

}  // namespace

SOFTNPU_C int aclrtGetSysParamOpt(int option, int64_t* value) {
  SOFTNPU_ENTER();
  return get_option(option, value);
}

SOFTNPU_C int aclrtSetSysParamOpt(int option, int64_t value) {
  SOFTNPU_ENTER();
  return set_option(option, value);
}

SOFTNPU_C int aclrtCtxSetSysParamOpt(int option, int64_t value) {
  SOFTNPU_ENTER();
  return set_option(option, value);
}

// Settings that change nothing which can be observed here.
SOFTNPU_C int aclrtSetDeviceSatMode(int) {
  SOFTNPU_ENTER();
  return kOk;
}
// Microseconds; what holds is what was asked for.
SOFTNPU_C int aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  SOFTNPU_ENTER();
  return *actual = timeout, kOk;
}
SOFTNPU_C int aclrtSetOpExecuteTimeOut(uint32_t) {
  SOFTNPU_ENTER();
  return kOk;
}
SOFTNPU_C int aclrtSetOpWaitTimeout(uint32_t) {
  SOFTNPU_ENTER();
  return kOk;
}

SOFTNPU_C const char* aclGetRecentErrMsg() { return last_message(); }
SOFTNPU_C int aclrtPeekAtLastError(int) { return last_code(false); }
SOFTNPU_C int aclrtGetLastError(int) { return last_code(true); }

SOFTNPU_C void aclAppLog(int level, const char* function, const char* file, uint32_t line,
                         const char* format, ...) {
  static const char* const wanted =
      std::getenv("SOFTNPU_LOG");  // smallest level to print: 0 debug .. 3 error
  if (!wanted || level < std::atoi(wanted)) return;
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "[%d] %s %s:%u ", level, function, file, line);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}
