#include "tensor.h"

#include <atomic>
#include <cstdio>
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
      throw Fault(kNnParameter, "softnpu: aclDataType " + std::to_string(dtype) + " is not emulated");
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
  for (size_t i = 0; i < tensor.sizes.size(); ++i) result += (i ? "," : "") + std::to_string(tensor.sizes[i]);
  return result + "]";
}

void extent(const aclTensor& tensor, int64_t* first, size_t* bytes) {
  const size_t bits = dtype_bits(tensor.dtype);
  int64_t last = tensor.offset, step = 0;
  bool empty = false, valid = tensor.offset >= 0;
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    empty |= tensor.sizes[i] == 0;
    valid &= tensor.sizes[i] >= 0 && tensor.strides[i] >= 0;
    valid &= !__builtin_mul_overflow(std::max<int64_t>(tensor.sizes[i] - 1, 0), tensor.strides[i], &step);
    valid &= !__builtin_add_overflow(last, step, &last);
  }
  if (!valid || last > INT64_MAX / 128)
    throw Fault(kNnParameter, "softnpu: " + describe(tensor) + ": sizes, strides or offset are negative or overflow");
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
  stream->push({launch->name, [launch] { execute(*launch); }, false, launch->arguments, host_ns});
  if (!launch->resolve) return kOk;
  const int code = stream->synchronise(-1);
  if (code == kOk) launch->resolve();
  return code;
} catch (const Fault& fault) {
  return fail(fault);
}

}  // namespace softnpu

using namespace softnpu;

namespace {

// A creator has no code to answer, so the injected fault is told on stderr.
std::nullptr_t said_null() {
  std::fprintf(stderr, "%s\n", last_message());
  return nullptr;
}

}  // namespace

SOFTNPU_C aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, int dtype, const int64_t* strides,
                                     int64_t offset, int format, const int64_t* storage, uint64_t storage_rank,
                                     void* data) {
  static Call call{__func__};
  if (call.enter()) return said_null();
  auto* tensor =
      new aclTensor{{sizes, sizes + rank}, {}, {storage, storage + storage_rank}, offset, dtype, format, data};
  if (strides)
    tensor->strides.assign(strides, strides + rank);
  else {
    tensor->strides.assign(rank, 1);
    for (size_t i = rank; i-- > 1;) tensor->strides[i - 1] = tensor->strides[i] * tensor->sizes[i];
  }
  alive(Alive::kTensor, 1);
  return tensor;
}

SOFTNPU_C int aclDestroyTensor(const aclTensor* tensor) {
  if (tensor) alive(Alive::kTensor, -1);
  delete tensor;
  return kOk;
}

SOFTNPU_C aclScalar* aclCreateScalar(void* value, int dtype) {
  static Call call{__func__};
  if (call.enter()) return said_null();
  try {
    dtype_bits(dtype);
  } catch (const Fault& fault) {
    fail(fault);
    return said_null();
  }
  auto* scalar = new aclScalar{dtype, {}};
  std::memcpy(scalar->bytes, value, dtype_bits(dtype) / 8);
  alive(Alive::kScalar, 1);
  return scalar;
}

SOFTNPU_C int aclDestroyScalar(const aclScalar* scalar) {
  if (scalar) alive(Alive::kScalar, -1);
  delete scalar;
  return kOk;
}

namespace {

template <class Array, class Value>
Array* create_array(const Value* values, uint64_t count) {
  alive(Alive::kArray, 1);
  return new Array{decltype(Array::values)(values, values + count)};
}

template <class Array>
int destroy_array(const Array* array) {
  if (array) alive(Alive::kArray, -1);
  delete array;
  return kOk;
}

}  // namespace

SOFTNPU_C aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return create_array<aclIntArray>(values, count);
}
SOFTNPU_C aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return create_array<aclBoolArray>(values, count);
}
SOFTNPU_C aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
  return create_array<aclFloatArray>(values, count);
}
SOFTNPU_C int aclDestroyIntArray(const aclIntArray* array) { return destroy_array(array); }
SOFTNPU_C int aclDestroyBoolArray(const aclBoolArray* array) { return destroy_array(array); }
SOFTNPU_C int aclDestroyFloatArray(const aclFloatArray* array) { return destroy_array(array); }

SOFTNPU_C aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
  auto* list = new aclTensorList;
  for (uint64_t i = 0; i < count; ++i) list->tensors.push_back(const_cast<aclTensor*>(tensors[i]));
  alive(Alive::kTensorList, 1);
  return list;
}

SOFTNPU_C int aclDestroyTensorList(const aclTensorList* list) {
  if (!list) return kOk;
  for (const aclTensor* tensor : list->tensors) aclDestroyTensor(tensor);
  alive(Alive::kTensorList, -1);
  delete list;
  return kOk;
}

SOFTNPU_C aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
  auto* list = new aclScalarList;
  for (uint64_t i = 0; i < count; ++i) list->scalars.push_back(const_cast<aclScalar*>(scalars[i]));
  alive(Alive::kArray, 1);
  return list;
}

SOFTNPU_C int aclDestroyScalarList(const aclScalarList* list) {
  if (!list) return kOk;
  for (const aclScalar* scalar : list->scalars) aclDestroyScalar(scalar);
  return destroy_array(list);
}

namespace {

int copy_dims(const std::vector<int64_t>& dims, int64_t** values, uint64_t* count) {
  *values = new int64_t[dims.size()];
  std::copy(dims.begin(), dims.end(), *values);
  *count = dims.size();
  return kOk;
}

}  // namespace

SOFTNPU_C int aclGetViewShape(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor->sizes, values, count);
}
SOFTNPU_C int aclGetViewStrides(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor->strides, values, count);
}
SOFTNPU_C int aclGetStorageShape(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor->storage, values, count);
}
SOFTNPU_C int aclGetViewOffset(const aclTensor* tensor, int64_t* offset) { return *offset = tensor->offset, kOk; }
SOFTNPU_C int aclGetDataType(const aclTensor* tensor, int* dtype) { return *dtype = tensor->dtype, kOk; }
SOFTNPU_C int aclGetFormat(const aclTensor* tensor, int* format) { return *format = tensor->format, kOk; }
SOFTNPU_C int aclGetRawTensorAddr(const aclTensor* tensor, void** address) { return *address = tensor->data, kOk; }

SOFTNPU_C int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  if (!executor) return kOk;
  if (!take_executor(executor)) return fail(kNnParameter, "softnpu: aclDestroyAclOpExecutor: not a live executor");
  alive(Alive::kExecutor, -1);
  count_prepared(executor->launch->name, -1);  // given up on purpose, as a question for the workspace's size is
  delete executor;
  return kOk;
}
