#include "tensor.h"

#include <cstring>
#include <mutex>
#include <unordered_set>

#include "device.h"
#include "memory.h"
#include "report.h"
#include "stream.h"

namespace softnpu {

size_t dtype_bits(int dtype) {
  switch (dtype) {
    case kInt4:
    case kFloat4E2M1:
      return 4;
    case kInt8:
    case kUint8:
    case kBool:
    case kFloat8E5M2:
    case kFloat8E4M3:
    case kFloat8E8M0:
      return 8;
    case kHalf:
    case kBFloat16:
    case kInt16:
    case kUint16:
      return 16;
    case kFloat:
    case kInt32:
    case kUint32:
    case kComplex32:
      return 32;
    case kDouble:
    case kInt64:
    case kUint64:
    case kComplex64:
      return 64;
    case kComplex128:
      return 128;
    default:
      throw Fault(kNnParameter,
                  "softnpu: aclDataType " + std::to_string(dtype) + " is not emulated");
  }
}

const char* dtype_name(int dtype) {
  switch (dtype) {
    case kFloat:
      return "FLOAT";
    case kHalf:
      return "FLOAT16";
    case kInt8:
      return "INT8";
    case kInt32:
      return "INT32";
    case kUint8:
      return "UINT8";
    case kInt16:
      return "INT16";
    case kUint16:
      return "UINT16";
    case kUint32:
      return "UINT32";
    case kInt64:
      return "INT64";
    case kUint64:
      return "UINT64";
    case kDouble:
      return "DOUBLE";
    case kBool:
      return "BOOL";
    case kComplex64:
      return "COMPLEX64";
    case kComplex128:
      return "COMPLEX128";
    case kBFloat16:
      return "BFLOAT16";
    case kInt4:
      return "INT4";
    case kFloat8E5M2:
      return "FLOAT8_E5M2";
    case kFloat8E4M3:
      return "FLOAT8_E4M3FN";
    case kFloat8E8M0:
      return "FLOAT8_E8M0";
    case kFloat4E2M1:
      return "FLOAT4_E2M1";
    default:
      return "UNKNOWN";
  }
}

std::string describe(const aclTensor& tensor) {
  std::string result = std::string(dtype_name(tensor.dtype)) + "[";
  for (size_t i = 0; i < tensor.sizes.size(); ++i)
    result += (i ? "," : "") + std::to_string(tensor.sizes[i]);
  return result + "]";
}

void extent(const aclTensor& tensor, int64_t* first, size_t* bytes) {
  const size_t bits = dtype_bits(tensor.dtype);
  int64_t last = tensor.offset, step = 0;
  bool empty = false, valid = tensor.offset >= 0;
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    empty |= tensor.sizes[i] == 0;
    valid &= tensor.sizes[i] >= 0 && tensor.strides[i] >= 0;
    valid &= !__builtin_mul_overflow(std::max<int64_t>(tensor.sizes[i] - 1, 0), tensor.strides[i],
                                     &step);
    valid &= !__builtin_add_overflow(last, step, &last);
  }
  if (!valid || last > INT64_MAX / 128)
    throw Fault(kNnParameter, "softnpu: " + describe(tensor) +
                                  ": sizes, strides or offset are negative or overflow");
  if (tensor.offset * static_cast<int64_t>(bits) % 8)
    throw Fault(kNnParameter, "softnpu: " + describe(tensor) + " begins inside a byte, at value " +
                                  std::to_string(tensor.offset) + " of its storage");
  *first = tensor.offset * static_cast<int64_t>(bits) / 8;
  *bytes = empty ? 0 : (static_cast<size_t>(last - tensor.offset + 1) * bits + 7) / 8;
}

int64_t storage_bytes(const aclTensor& tensor) {
  if (tensor.storage.empty()) return -1;
  int64_t elements = 1;
  for (const int64_t size : tensor.storage) elements *= size;
  return (elements * static_cast<int64_t>(dtype_bits(tensor.dtype)) + 7) / 8;
}

namespace {

struct Executors {
  std::mutex mutex;
  std::unordered_set<aclOpExecutor*> live;
};

Executors& executors() {
  static auto* const instance = new Executors;
  return *instance;
}

}  // namespace

void live_executor(aclOpExecutor* executor) {
  std::lock_guard lock(executors().mutex);
  executors().live.insert(executor);
}

bool take_executor(aclOpExecutor* executor) {
  std::lock_guard lock(executors().mutex);
  return executors().live.erase(executor) > 0;
}

namespace {

void execute(const Launch& launch) {
  for (const Access& access : launch.accesses)
    still_alive(access.pointer, access.bytes, access.allocation, launch.name.c_str());
  if (launch.workspace) std::memset(launch.scratch, 0xFF, launch.workspace);
  launch.kernel();
}

}  // namespace

int enqueue(const std::shared_ptr<Launch>& launch, Handle handle) try {
  const std::shared_ptr<Stream> stream = find_stream(handle, current_device());
  const uint64_t host_ns = now_ns() - launch->prepared_ns;
  count_launch(launch->name, host_ns);
  stream->push({launch->name, [launch] { execute(*launch); }, false, launch->arguments, host_ns,
                launch->failed});
  if (!launch->resolve) return kOk;
  const int code = stream->synchronise(-1);
  if (code == kOk) launch->resolve();
  return code;
} catch (const Fault& fault) {
  return fail(fault);
}

}  // namespace softnpu
