// The graph-operator path of older CANN, profiling and dump hooks. Operators of that path are refused by name, never
// skipped.
#include <string>
#include <vector>

#include "format.h"
#include "report.h"

namespace softnpu {
namespace {

int refuse(const char* what) { return fail(kUnsupportedApi, "softnpu: %s is not emulated", what); }

int refuse_operator(const char* type) {
  return fail(
      kUnsupportedApi,
      "softnpu: operator %s was sent over the graph-operator path (aclopCompileAndExecute), which is not emulated: "
      "its aclnn function is missing from softnpu",
      type);
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

SOFTNPU_C Buffer* aclCreateDataBuffer(void* data, size_t size) { return new Buffer{data, size}; }
SOFTNPU_C int aclDestroyDataBuffer(const Buffer* buffer) { return delete buffer, kOk; }

SOFTNPU_C Description* aclCreateTensorDesc(int dtype, int rank, const int64_t* dims, int format) {
  return new Description{dtype, format, {dims, dims + rank}, {dims, dims + rank}};
}
SOFTNPU_C void aclDestroyTensorDesc(const Description* description) { delete description; }
SOFTNPU_C int aclSetTensorFormat(Description* description, int format) { return description->format = format, kOk; }
SOFTNPU_C int aclSetTensorShape(Description* description, int rank, const int64_t* dims) {
  return description->dims.assign(dims, dims + rank), kOk;
}
SOFTNPU_C int aclSetTensorPlaceMent(Description*, int) { return kOk; }
SOFTNPU_C void aclSetTensorDescName(Description*, const char*) {}
SOFTNPU_C int aclGetTensorDescFormat(const Description* description) { return description->format; }
SOFTNPU_C int aclGetTensorDescType(const Description* description) { return description->dtype; }
SOFTNPU_C size_t aclGetTensorDescNumDims(const Description* description) { return description->dims.size(); }
SOFTNPU_C int aclGetTensorDescDimV2(const Description* description, size_t index, int64_t* size) {
  if (index >= description->dims.size()) return fail(kAclParameter, "softnpu: dimension %zu", index);
  return *size = description->dims[index], kOk;
}

namespace {

int execute_operator(const char* type, Description* const inputs[], Buffer* const from[], Description* const outputs[],
                     Buffer* const to[], Handle stream) try {
  if (std::string(type) != "Identity") return refuse_operator(type);
  return format_cast(*inputs[0], *from[0], *outputs[0], *to[0], stream);
} catch (const Fault& fault) {
  return fail(fault);
}

}  // namespace

SOFTNPU_C int aclopCompileAndExecute(const char* type, int, Description* const inputs[], Buffer* const from[], int,
                                     Description* const outputs[], Buffer* const to[], const void*, int, int,
                                     const char*, Handle stream) {
  SOFTNPU_ENTER();
  return execute_operator(type, inputs, from, outputs, to, stream);
}

SOFTNPU_C int aclopCompileAndExecuteV2(const char* type, int, Description* inputs[], Buffer* from[], int,
                                       Description* outputs[], Buffer* to[], void*, int, int, const char*,
                                       Handle stream) {
  SOFTNPU_ENTER();
  return execute_operator(type, inputs, from, outputs, to, stream);
}

SOFTNPU_C void* aclopCreateAttr() { return new char; }
SOFTNPU_C void aclopDestroyAttr(const void* attributes) { delete static_cast<const char*>(attributes); }
SOFTNPU_C int aclopSetAttrBool(void*, const char*, uint8_t) { return kOk; }
SOFTNPU_C int aclopSetAttrDataType(void*, const char*, int) { return kOk; }
SOFTNPU_C int aclopSetAttrFloat(void*, const char*, float) { return kOk; }
SOFTNPU_C int aclopSetAttrInt(void*, const char*, int64_t) { return kOk; }
SOFTNPU_C int aclopSetAttrListBool(void*, const char*, int, const uint8_t*) { return kOk; }
SOFTNPU_C int aclopSetAttrListFloat(void*, const char*, int, const float*) { return kOk; }
SOFTNPU_C int aclopSetAttrListInt(void*, const char*, int, const int64_t*) { return kOk; }
SOFTNPU_C int aclopSetAttrListListInt(void*, const char*, int, const int*, const int64_t* const[]) { return kOk; }
SOFTNPU_C int aclopSetAttrString(void*, const char*, const char*) { return kOk; }

#define SOFTNPU_REFUSE(name) \
  SOFTNPU_C int name() {     \
    SOFTNPU_ENTER();         \
    return refuse(#name);    \
  }

SOFTNPU_REFUSE(aclrtBinaryLoadFromData)
SOFTNPU_REFUSE(aclrtBinaryGetFunction)
SOFTNPU_REFUSE(aclrtGetFunctionAddr)
SOFTNPU_REFUSE(aclrtMemExportToShareableHandle)
SOFTNPU_REFUSE(aclrtMemImportFromShareableHandle)
SOFTNPU_REFUSE(aclrtMemSetPidToShareableHandle)
SOFTNPU_REFUSE(aclrtProcessReport)
SOFTNPU_REFUSE(rtDevBinaryRegister)
SOFTNPU_REFUSE(rtFunctionRegister)
SOFTNPU_REFUSE(rtGetC2cCtrlAddr)
SOFTNPU_REFUSE(rtKernelLaunch)
SOFTNPU_REFUSE(aclmdlSetDump)

// Called at start and exit whether or not anything is profiled or dumped: nothing to do is the right answer.
SOFTNPU_C int aclmdlInitDump() { return kOk; }
SOFTNPU_C int aclmdlFinalizeDump() { return kOk; }
SOFTNPU_C uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
SOFTNPU_C int MsprofRegisterCallback(uint32_t, void*) { return kOk; }
SOFTNPU_C int MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) { return kOk; }
SOFTNPU_C int MsprofReportApi(uint32_t, const void*) { return kOk; }
SOFTNPU_C int MsprofReportCompactInfo(uint32_t, const void*, uint32_t) { return kOk; }
SOFTNPU_C uint64_t MsprofSysCycleTime() { return now_ns(); }
