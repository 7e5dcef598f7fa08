// The graph-operator path of older CANN, profiling and dump hooks. Operators of that path are
// refused by name, never skipped.
#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

#include "format.h"
#include "report.h"

namespace softnpu {
namespace {

int refuse(const char* what) { return fail(kUnsupportedApi, "softnpu: %s is not emulated", what); }

int refuse_operator(const char* type) {
  return fail(kUnsupportedApi,
              "softnpu: operator %s was sent over the graph-operator path "
              "(aclopCompileAndExecute), which is not emulated: "
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
SOFTNPU_C int aclSetTensorFormat(Description* description, int format) {
  return description->format = format, kOk;
}
SOFTNPU_C int aclSetTensorShape(Description* description, int rank, const int64_t* dims) {
  return description->dims.assign(dims, dims + rank), kOk;
}
SOFTNPU_C int aclSetTensorPlaceMent(Description* description, int placement) {
  return description->on_host = placement != 0, kOk;  // 0 is ACL_MEMTYPE_DEVICE
}
SOFTNPU_C void aclSetTensorDescName(Description*, const char*) {}
SOFTNPU_C int aclGetTensorDescFormat(const Description* description) { return description->format; }
SOFTNPU_C int aclGetTensorDescType(const Description* description) { return description->dtype; }
SOFTNPU_C size_t aclGetTensorDescNumDims(const Description* description) {
  return description->dims.size();
}
SOFTNPU_C int aclGetTensorDescDimV2(const Description* description, size_t index, int64_t* size) {
  if (index >= description->dims.size())
    return fail(kAclParameter, "softnpu: dimension %zu", index);
  return *size = description->dims[index], kOk;
}

namespace softnpu {
namespace {

struct Operators {
  std::mutex mutex;
  std::map<std::string, GraphOperator> all{{"Identity", format_cast}};

  GraphOperator find(const std::string& type) {  // nullptr: not here
    std::lock_guard lock(mutex);
    const auto found = all.find(type);
    return found == all.end() ? nullptr : found->second;
  }
};

Operators& operators() {
  static auto* const instance = new Operators;
  return *instance;
}

std::vector<GraphTensor> tensors(int count, Description* const descriptions[],
                                 Buffer* const buffers[]) {
  std::vector<GraphTensor> result;
  for (int i = 0; i < count; ++i) result.push_back({descriptions[i], buffers[i]});
  return result;
}

const Attributes& given(const Attributes* attributes) {  // null: the operator has none
  static const Attributes none;
  return attributes ? *attributes : none;
}

// Operators register when their library is loaded, which torch_npu does with its first aclnn call.
void load_operators() {
  Dl_info here{};
  if (!dladdr(reinterpret_cast<void*>(&load_operators), &here)) return;
  const std::string path = here.dli_fname;
  dlopen((path.substr(0, path.rfind('/') + 1) + "libopapi.so").c_str(), RTLD_NOW);
}

int execute_operator(const GraphCall& call) try {
  if (!operators().find(call.type)) load_operators();
  const GraphOperator found = operators().find(call.type);
  return found ? found(call) : refuse_operator(call.type.c_str());
} catch (const Fault& fault) {
  return fail(fault);
}

}  // namespace

void register_graph_operator(const std::string& type, GraphOperator run) {
  std::lock_guard lock(operators().mutex);
  operators().all[type] = run;
}

}  // namespace softnpu

SOFTNPU_C int aclopCompileAndExecute(const char* type, int inputs, Description* const input[],
                                     Buffer* const from[], int outputs, Description* const output[],
                                     Buffer* const to[], const Attributes* attributes, int, int,
                                     const char*, Handle stream) {
  SOFTNPU_ENTER();
  return execute_operator({type, tensors(inputs, input, from), tensors(outputs, output, to),
                           given(attributes), stream});
}

SOFTNPU_C int aclopCompileAndExecuteV2(const char* type, int inputs, Description* input[],
                                       Buffer* from[], int outputs, Description* output[],
                                       Buffer* to[], Attributes* attributes, int, int, const char*,
                                       Handle stream) {
  SOFTNPU_ENTER();
  return execute_operator({type, tensors(inputs, input, from), tensors(outputs, output, to),
                           given(attributes), stream});
}

SOFTNPU_C Attributes* aclopCreateAttr() { return new Attributes; }
SOFTNPU_C void aclopDestroyAttr(const Attributes* attributes) { delete attributes; }
SOFTNPU_C int aclopSetAttrBool(Attributes* attributes, const char* name, uint8_t value) {
  return (*attributes)[name] = int64_t{value}, kOk;
}
SOFTNPU_C int aclopSetAttrFloat(Attributes* attributes, const char* name, float value) {
  return (*attributes)[name] = double{value}, kOk;
}
SOFTNPU_C int aclopSetAttrInt(Attributes* attributes, const char* name, int64_t value) {
  return (*attributes)[name] = value, kOk;
}
SOFTNPU_C int aclopSetAttrListInt(Attributes* attributes, const char* name, int count,
                                  const int64_t* values) {
  return (*attributes)[name] = std::vector<int64_t>(values, values + count), kOk;
}
SOFTNPU_C int aclopSetAttrString(Attributes* attributes, const char* name, const char* value) {
  return (*attributes)[name] = std::string(value), kOk;
}
// No emulated operator reads these.
SOFTNPU_C int aclopSetAttrDataType(Attributes*, const char*, int) { return kOk; }
SOFTNPU_C int aclopSetAttrListBool(Attributes*, const char*, int, const uint8_t*) { return kOk; }
SOFTNPU_C int aclopSetAttrListFloat(Attributes*, const char*, int, const float*) { return kOk; }
SOFTNPU_C int aclopSetAttrListListInt(Attributes*, const char*, int, const int*,
                                      const int64_t* const[]) {
  return kOk;
}

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

// Called at start and exit whether or not anything is profiled or dumped: nothing to do is the
// right answer.
SOFTNPU_C int aclmdlInitDump() { return kOk; }
SOFTNPU_C int aclmdlFinalizeDump() { return kOk; }
SOFTNPU_C uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
SOFTNPU_C int MsprofRegisterCallback(uint32_t, void*) { return kOk; }
SOFTNPU_C int MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) { return kOk; }
SOFTNPU_C int MsprofReportApi(uint32_t, const void*) { return kOk; }
SOFTNPU_C int MsprofReportCompactInfo(uint32_t, const void*, uint32_t) { return kOk; }
SOFTNPU_C uint64_t MsprofSysCycleTime() { return now_ns(); }
