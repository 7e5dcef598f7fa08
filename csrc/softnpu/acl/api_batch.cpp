// Many copies in one call: each is the single copy of api_memory.cpp between the sides that its
// attributes name.
#include <cstdint>
#include <cstring>
#include <string>

#include "memory.h"
#include "report.h"

extern "C" {
int aclrtMemcpy(void* to, size_t room, const void* from, size_t count, int kind);
int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t count, int kind,
                     softnpu::Handle stream);
}

namespace softnpu {
namespace {

struct Location {  // aclrtMemLocation; type 0 host, 1 device
  uint32_t id;
  int type;
};
struct Attributes {  // aclrtMemcpyBatchAttr
  Location to, from;
  uint8_t reserved[16];
};

struct Batch {
  void** to;
  const size_t* room;
  void* const* from;
  const size_t* sizes;
  size_t count;
  const Attributes* attributes;
  const size_t* first;  // copies from first[i] on have attributes[i], up to first[i + 1]
  size_t kinds;
};

int copy_kind(const Attributes& a) {
  if (a.to.type < 0 || a.to.type > 1 || a.from.type < 0 || a.from.type > 1) return -1;
  constexpr int by_sides[2][2] = {{kHostToHost, kHostToDevice}, {kDeviceToHost, kDeviceToDevice}};
  return by_sides[a.from.type][a.to.type];
}

// `one` copies; the copies before a failing one are made, and `failed` is its number.
template <class One>
int copy_all(const Batch& batch, size_t* failed, const char* who, One one) {
  if (failed) *failed = SIZE_MAX;
  if (!batch.to || !batch.room || !batch.from || !batch.sizes || !batch.count ||
      !batch.attributes || !batch.first || !batch.kinds || batch.first[0] != 0)
    return fail(kParameter,
                "softnpu: %s: an empty batch, a null list, or attributes that do not "
                "begin at copy 0",
                who);
  size_t kind = 0;
  for (size_t i = 0; i < batch.count; ++i) {
    while (kind + 1 < batch.kinds && batch.first[kind + 1] <= i) ++kind;
    const int code = one(i, copy_kind(batch.attributes[kind]));
    if (code == kOk) continue;
    if (failed) *failed = i;
    return code;
  }
  return kOk;
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C int aclrtMemcpyBatch(void** to, size_t* room, void** from, size_t* sizes, size_t count,
                               const Attributes* attributes, size_t* first, size_t kinds,
                               size_t* failed) {
  SOFTNPU_ENTER();
  return copy_all(
      {to, room, from, sizes, count, attributes, first, kinds}, failed, __func__,
      [&](size_t i, int kind) { return aclrtMemcpy(to[i], room[i], from[i], sizes[i], kind); });
}

SOFTNPU_C int aclrtMemcpyBatchAsync(void** to, size_t* room, void** from, size_t* sizes,
                                    size_t count, const Attributes* attributes, size_t* first,
                                    size_t kinds, size_t* failed, Handle stream) {
  SOFTNPU_ENTER();
  return copy_all({to, room, from, sizes, count, attributes, first, kinds}, failed, __func__,
                  [&](size_t i, int kind) {
                    return aclrtMemcpyAsync(to[i], room[i], from[i], sizes[i], kind, stream);
                  });
}
