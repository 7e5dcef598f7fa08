// Tensors, scalars, arrays and lists: the arguments of the two-phase operator interface, as
// handles.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "handles.h"
#include "report.h"
#include "tensor.h"

namespace softnpu {
namespace {

// One kind of handle: what it is called, how it is counted.
template <class T>
struct Kind;
template <>
struct Kind<aclTensor> {
  static constexpr const char* name = "aclTensor";
  static constexpr Alive counted = Alive::kTensor;
};
template <>
struct Kind<aclScalar> {
  static constexpr const char* name = "aclScalar";
  static constexpr Alive counted = Alive::kScalar;
};
template <>
struct Kind<aclIntArray> {
  static constexpr const char* name = "aclIntArray";
  static constexpr Alive counted = Alive::kArray;
};
template <>
struct Kind<aclBoolArray> {
  static constexpr const char* name = "aclBoolArray";
  static constexpr Alive counted = Alive::kArray;
};
template <>
struct Kind<aclFloatArray> {
  static constexpr const char* name = "aclFloatArray";
  static constexpr Alive counted = Alive::kArray;
};
template <>
struct Kind<aclTensorList> {
  static constexpr const char* name = "aclTensorList";
  static constexpr Alive counted = Alive::kTensorList;
};
template <>
struct Kind<aclScalarList> {
  static constexpr const char* name = "aclScalarList";
  static constexpr Alive counted = Alive::kArray;
};

template <class T>
Handles<T>& handles() {
  static auto* const all = new Handles<T>;
  return *all;
}

// Creators have no code to answer, and torch_npu reads none from a destruction: said on stderr.
std::nullptr_t said_null() {
  std::fprintf(stderr, "%s\n", last_message());
  return nullptr;
}

template <class T>
T* create(T value) {
  if (refuse_fork(Kind<T>::name)) return said_null();
  T* const handle = handles<T>().create(std::move(value));
  if (!handle) {
    fail(kNnInner, "softnpu: %zu handles of %s are alive: are they never destroyed?",
         Handles<T>::kMost, Kind<T>::name);
    return said_null();
  }
  alive(Kind<T>::counted, 1);
  return handle;
}

template <class T>
int destroy(const T* handle) {
  if (!handle) return kOk;
  if (const int refused = refuse_fork(Kind<T>::name)) return refused;
  if (!handles<T>().destroy(handle)) {
    const int code =
        fail(kNnParameter, "softnpu: aclDestroy%s: %p is no live handle (destroyed twice?)",
             Kind<T>::name + 3, static_cast<const void*>(handle));
    said_null();
    return code;
  }
  alive(Kind<T>::counted, -1);
  return kOk;
}

template <class T>
void require_live(const T* handle, int index) {
  if (handle && !handles<T>().live(handle))
    throw Fault(kNnParameter, "argument " + std::to_string(index) + " is no live " + Kind<T>::name +
                                  " (destroyed already, or never created)");
}

template <class Array, class Value>
Array* create_array(const Value* values, uint64_t count) {
  return create(Array{decltype(Array::values)(values, values + count)});
}

// The members first: the list is gone when they are looked at otherwise.
template <class List, class Member>
int destroy_list(const List* list, std::vector<Member*> List::* members) {
  if (!handles<List>().live(list)) return destroy(list);
  int code = kOk;
  for (const Member* member : list->*members)
    if (const int own = destroy(member)) code = own;
  destroy(list);
  return code;
}

template <class T, class Read>
int read_of(const T* handle, Read read) try {
  if (!handle) throw Fault(kNnNullptr, std::string("softnpu: the ") + Kind<T>::name + " is null");
  require_live(handle, 1);
  read();
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}

int copy_dims(const aclTensor* tensor, std::vector<int64_t> aclTensor::* dims, int64_t** values,
              uint64_t* count) {
  return read_of(tensor, [&] {
    const std::vector<int64_t>& found = tensor->*dims;
    *values = new int64_t[found.size()];  // the caller frees it with delete[]
    std::copy(found.begin(), found.end(), *values);
    *count = found.size();
  });
}

}  // namespace

void refuse_dead(const aclTensor* handle, int index) { require_live(handle, index); }
void refuse_dead(const aclScalar* handle, int index) { require_live(handle, index); }
void refuse_dead(const aclIntArray* handle, int index) { require_live(handle, index); }
void refuse_dead(const aclBoolArray* handle, int index) { require_live(handle, index); }
void refuse_dead(const aclFloatArray* handle, int index) { require_live(handle, index); }
void refuse_dead(const aclTensorList* handle, int index) {
  require_live(handle, index);
  if (!handle) return;
  for (const aclTensor* tensor : handle->tensors) require_live(tensor, index);
}
void refuse_dead(const aclScalarList* handle, int index) {
  require_live(handle, index);
  if (!handle) return;
  for (const aclScalar* scalar : handle->scalars) require_live(scalar, index);
}

}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, int dtype,
                                     const int64_t* strides, int64_t offset, int format,
                                     const int64_t* storage, uint64_t storage_rank, void* data) {
  static constinit Call call{__func__};
  if (call.enter()) return said_null();
  aclTensor tensor{
      {sizes, sizes + rank}, {}, {storage, storage + storage_rank}, offset, dtype, format, data};
  if (strides)
    tensor.strides.assign(strides, strides + rank);
  else {
    tensor.strides.assign(rank, 1);
    for (size_t i = rank; i-- > 1;) tensor.strides[i - 1] = tensor.strides[i] * tensor.sizes[i];
  }
  return create(std::move(tensor));
}

SOFTNPU_C int aclDestroyTensor(const aclTensor* tensor) { return destroy(tensor); }

SOFTNPU_C aclScalar* aclCreateScalar(void* value, int dtype) {
  static constinit Call call{__func__};
  if (call.enter()) return said_null();
  try {
    dtype_bits(dtype);
  } catch (const Fault& fault) {
    fail(fault);
    return said_null();
  }
  aclScalar scalar{dtype, {}};
  std::memcpy(scalar.bytes, value, dtype_bits(dtype) / 8);
  return create(scalar);
}

SOFTNPU_C int aclDestroyScalar(const aclScalar* scalar) { return destroy(scalar); }

SOFTNPU_C aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return create_array<aclIntArray>(values, count);
}
SOFTNPU_C aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return create_array<aclBoolArray>(values, count);
}
SOFTNPU_C aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
  return create_array<aclFloatArray>(values, count);
}
SOFTNPU_C int aclDestroyIntArray(const aclIntArray* array) { return destroy(array); }
SOFTNPU_C int aclDestroyBoolArray(const aclBoolArray* array) { return destroy(array); }
SOFTNPU_C int aclDestroyFloatArray(const aclFloatArray* array) { return destroy(array); }

SOFTNPU_C aclTensorList* aclCreateTensorList(aclTensor* const* tensors, uint64_t count) {
  return create(aclTensorList{{tensors, tensors + count}});
}
SOFTNPU_C int aclDestroyTensorList(const aclTensorList* list) {
  return destroy_list(list, &aclTensorList::tensors);
}

SOFTNPU_C aclScalarList* aclCreateScalarList(aclScalar* const* scalars, uint64_t count) {
  return create(aclScalarList{{scalars, scalars + count}});
}
SOFTNPU_C int aclDestroyScalarList(const aclScalarList* list) {
  return destroy_list(list, &aclScalarList::scalars);
}

SOFTNPU_C int aclGetViewShape(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor, &aclTensor::sizes, values, count);
}
SOFTNPU_C int aclGetViewStrides(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor, &aclTensor::strides, values, count);
}
SOFTNPU_C int aclGetStorageShape(const aclTensor* tensor, int64_t** values, uint64_t* count) {
  return copy_dims(tensor, &aclTensor::storage, values, count);
}
SOFTNPU_C int aclGetViewOffset(const aclTensor* tensor, int64_t* offset) {
  return read_of(tensor, [&] { *offset = tensor->offset; });
}
SOFTNPU_C int aclGetDataType(const aclTensor* tensor, int* dtype) {
  return read_of(tensor, [&] { *dtype = tensor->dtype; });
}
SOFTNPU_C int aclGetFormat(const aclTensor* tensor, int* format) {
  return read_of(tensor, [&] { *format = tensor->format; });
}
SOFTNPU_C int aclGetRawTensorAddr(const aclTensor* tensor, void** address) {
  return read_of(tensor, [&] { *address = tensor->data; });
}

SOFTNPU_C int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  if (const int refused = refuse_fork(__func__)) return refused;
  if (!executor) return kOk;
  if (!take_executor(executor))
    return fail(kNnParameter, "softnpu: aclDestroyAclOpExecutor: not a live executor");
  alive(Alive::kExecutor, -1);
  count_prepared(executor->launch->name,
                 -1);  // given up on purpose, as a question for the workspace's size is
  delete executor;
  return kOk;
}
