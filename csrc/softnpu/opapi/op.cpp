
#include "op.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstring>
#include <memory>
#include <set>
#include <sstream>

#include "softnpu/acl/config.h"
#include "softnpu/acl/device.h"
#include "softnpu/acl/faults.h"
#include "softnpu/acl/fork.h"
#include "softnpu/acl/memory.h"

namespace softnpu {
namespace {

thread_local uint64_t writes = 0;

std::string shape(at::IntArrayRef sizes) {
  std::string result = "[";
  for (size_t i = 0; i < sizes.size(); ++i) result += (i ? "," : "") + std::to_string(sizes[i]);
  return result + "]";
}

template <class T>
T read(const aclScalar* raw) {
  T value;
  std::memcpy(&value, raw->bytes, sizeof value);
  return value;
}

void run_kernel(const std::string& name, bool has_output, const std::function<void()>& kernel) {
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset);
  const uint64_t before = writes;
  try {
    if (!injected_idleness(name)) kernel();
  } catch (const c10::Error& error) {
    throw Fault(kKernelFault, error.what_without_backtrace());
  }
  if (has_output && writes == before) notice_idle_launch(name);
}

}  // namespace

void Out::operator=(const at::Tensor& value) const {
  touch();
  if (value.sizes() != tensor_.sizes() && !(value.numel() == 1 && tensor_.numel() == 1))
    throw Fault(kKernelFault, "the result is " + shape(value.sizes()) + ", the output tensor " +
                                  shape(tensor_.sizes()));
  tensor_.copy_(value.sizes() == tensor_.sizes() ? value : value.reshape(tensor_.sizes()));
}

void Out::touch() const { ++writes; }

void Growing::operator=(const at::Tensor& value) const {
  whole.touch();
  *sizes = value.sizes().vec();
  (*whole).as_strided(value.sizes(), value.contiguous().strides()).copy_(value);
}

at::ScalarType scalar_type(int dtype) {
  switch (dtype) {
    case kFloat:
      return at::kFloat;
    case kHalf:
      return at::kHalf;
    case kInt8:
      return at::kChar;
    case kInt32:
      return at::kInt;
    case kUint8:
      return at::kByte;
    case kInt16:
      return at::kShort;
    case kUint16:
      return at::kUInt16;
    case kUint32:
      return at::kUInt32;
    case kInt64:
      return at::kLong;
    case kUint64:
      return at::kUInt64;
    case kDouble:
      return at::kDouble;
    case kBool:
      return at::kBool;
    case kComplex32:
      return at::kComplexHalf;
    case kComplex64:
      return at::kComplexFloat;
    case kComplex128:
      return at::kComplexDouble;
    case kBFloat16:
      return at::kBFloat16;
    case kFloat8E5M2:
      return at::kFloat8_e5m2;
    case kFloat8E4M3:
      return at::kFloat8_e4m3fn;
    case kFloat8E8M0:
      return at::kFloat8_e8m0fnu;
    case kFloat4E2M1:
      return at::kFloat4_e2m1fn_x2;  // two to a byte, the even one in the low half
    case kInt4:
      return at::kBits4x2;  // the same; torch has no signed name for it
    default:
      throw Fault(kNnParameter, "aclDataType " + std::to_string(dtype) + " is not emulated");
  }
}

at::Scalar scalar_value(const aclScalar* raw) {
  switch (raw->dtype) {
    case kFloat:
      return read<float>(raw);
    case kDouble:
      return read<double>(raw);
    case kHalf:
      return static_cast<float>(read<at::Half>(raw));
    case kBFloat16:
      return static_cast<float>(read<at::BFloat16>(raw));
    case kInt64:
      return read<int64_t>(raw);
    case kInt32:
      return read<int32_t>(raw);
    case kInt16:
      return read<int16_t>(raw);
    case kInt8:
      return read<int8_t>(raw);
    case kUint8:
      return read<uint8_t>(raw);
    case kBool:
      return read<bool>(raw);
    case kComplex64:
      return read<c10::complex<float>>(raw);
    case kComplex128:
      return read<c10::complex<double>>(raw);
    default:
      throw Fault(kNnParameter,
                  std::string("a scalar of ") + dtype_name(raw->dtype) + " is not emulated");
  }
}

Builder::Builder(const char* name, bool checked)
    : launch(std::make_shared<Launch>()), checked_(checked) {
  launch->name = name;
  launch->prepared_ns = now_ns();
}

void Builder::note(const std::string& argument) {
  if (!launch->arguments.empty()) launch->arguments += ", ";
  launch->arguments += argument;
}

namespace {

// What torch_npu sends on A2 and A3 when such a copy is more than bytes.
bool copies_between_devices(const std::string& name) {
  static const std::set<std::string> names = {"AsStrided",    "BroadcastTo", "Slice",
                                              "StridedSlice", "Transpose",   "ViewCopy"};
  return names.count(name) != 0;
}

}  // namespace

void* Builder::alias(const void* pointer, size_t bytes) {
  if (!bytes) return nullptr;
  const int device = current_device();
  const bool peer = copies_between_devices(launch->name) && reaches(device, device_of(pointer));
  const Range range = resolve(pointer, bytes, peer ? -1 : device, launch->name.c_str());
  launch->accesses.push_back({pointer, bytes, range.allocation});
  return range.alias;
}

namespace {

bool is_dense(const aclTensor& raw) {
  int64_t step = 1;
  for (size_t i = raw.sizes.size(); i-- > 0; step *= raw.sizes[i])
    if (raw.sizes[i] != 1 && raw.strides[i] != step) return false;
  return true;
}

}  // namespace

at::Tensor Builder::tensor(const aclTensor* raw) {
  ++tensors_;
  if (tracing()) note(raw ? describe(*raw) : "none");
  if (!raw) return {};
  if (tile_width(*raw)) throw Fault(kNnParameter, "a tensor in the NZ format is not emulated here");
  int64_t first = 0;
  size_t bytes = 0;
  extent(*raw, &first, &bytes);
  const int64_t end = first + static_cast<int64_t>(bytes), held = storage_bytes(*raw);
  // torch_npu keeps the old storage dims of a storage that was resized: a dense tensor may be
  // larger.
  if (bytes && held >= 0 && end > held && !(raw->offset == 0 && is_dense(*raw)))
    throw Fault(kNnParameter, "a view of " + describe(*raw) + " reaches byte " +
                                  std::to_string(end) + " of a storage of " + std::to_string(held));
  void* const data = alias(static_cast<const char*>(raw->data) + first, bytes);
  const auto options = at::TensorOptions().dtype(scalar_type(raw->dtype)).device(at::kCPU);
  std::vector<int64_t> sizes = raw->sizes, strides = raw->strides;
  if (dtype_bits(raw->dtype) == 4 && !sizes.empty()) {
    // Two to a byte along the dimension without gaps: the last, or the one before it of a
    // transposed matrix.
    const size_t packed = sizes.size() - (strides.back() == 1 || sizes.size() == 1 ? 1 : 2);
    if (strides[packed] != 1) throw Fault(kNnParameter, "4-bit values with gaps are not emulated");
    sizes[packed] = (sizes[packed] + 1) / 2;
    for (size_t i = 0; i < strides.size(); ++i)
      if (i != packed) strides[i] = (strides[i] + 1) / 2;
  }
  return at::from_blob(data, sizes, strides, options);
}

void Builder::refuse_null(const aclTensor* raw) const {
  if (!raw && !checked_)
    throw Fault(kNnNullptr, "tensor " + std::to_string(tensors_ + 1) + " of its arguments is null");
}

at::Tensor Builder::required(const aclTensor* raw) {
  refuse_null(raw);
  return tensor(raw);
}

Out Builder::required_out(const aclTensor* raw) {
  refuse_null(raw);
  return out(raw);
}

Out Builder::out(const aclTensor* raw) {
  at::Tensor result = tensor(raw);
  has_output |= result.defined() && result.numel() > 0;
  return Out(std::move(result));
}

void set_kernel(Builder& b, std::function<void()> kernel) {
  b.launch->kernel = [name = b.launch->name, has_output = b.has_output,
                      kernel = std::move(kernel)] { run_kernel(name, has_output, kernel); };
}

int finish(Builder& b, Prepared prepared, uint64_t* workspace, aclOpExecutor** executor) {
  const std::string name = b.launch->name;
  set_kernel(b, std::move(prepared.kernel));
  b.launch->failed = std::move(prepared.failed);
  if (!b.growing.empty()) {
    b.launch->resolve = [growing = b.growing] {
      for (const auto& [tensor, sizes] : growing) {
        tensor->sizes = *sizes;
        tensor->strides.assign(sizes->size(), 1);
        for (size_t i = sizes->size(); i-- > 1;)
          tensor->strides[i - 1] = tensor->strides[i] * (*sizes)[i];
      }
    };
  }
  alive(Alive::kExecutor, 1);
  count_prepared(name, 1);
  *workspace = b.launch->workspace = config().workspace;
  *executor = new aclOpExecutor{b.launch};
  live_executor(*executor);
  return kOk;
}

int report_exception(const char* name) {
  try {
    throw;
  } catch (const Fault& fault) {
    return fail(fault.code, "softnpu: %s: %s", name, fault.what());
  } catch (const c10::Error& error) {
    return fail(kNnParameter, "softnpu: %s: %s", name, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(kNnInner, "softnpu: %s: %s", name, error.what());
  }
}

namespace {

// The workspace that was asked for must be live memory of this device, now and when the kernel
// runs.
void give_workspace(Launch& launch, void* workspace, uint64_t size) {
  if (!launch.workspace) return;
  if (size < launch.workspace)
    throw Fault(kNnParameter, "softnpu: " + launch.name + ": a workspace of " +
                                  std::to_string(size) + " bytes, phase 1 asked for " +
                                  std::to_string(launch.workspace));
  const Range range =
      resolve(workspace, launch.workspace, current_device(), (launch.name + ": workspace").c_str());
  launch.accesses.push_back({workspace, launch.workspace, range.allocation});
  launch.scratch = range.alias;
}

}  // namespace

int phase2(Call& call, void* workspace, uint64_t size, aclOpExecutor* executor, Handle stream) {
  const int code = call.enter();
  if (forked()) return code;
  if (!executor)
    return fail(kNnNullptr, "softnpu: %s: the executor is null (phase 1 failed?)",
                call.name().c_str());
  if (!take_executor(executor))
    return fail(kNnParameter, "softnpu: %s: not a live executor (used twice?)",
                call.name().c_str());
  const std::unique_ptr<aclOpExecutor> once(executor);
  Launch& launch = *executor->launch;
  alive(Alive::kExecutor, -1);
  count_prepared(launch.name, -1);
  if (code) return code;
  if (launch.name != call.name())
    return fail(kNnParameter, "softnpu: %s: the executor of %s", call.name().c_str(),
                launch.name.c_str());
  try {
    give_workspace(launch, workspace, size);
  } catch (const Fault& fault) {
    return fail(fault);
  }
  return enqueue(executor->launch, stream);
}

std::string declared(const std::vector<const char*>& types, const std::vector<const char*>& names) {
  std::istringstream left([&names] {
    std::string all;
    for (const char* part : names) all += std::string(all.empty() ? "" : ", ") + part;
    return all;
  }());
  std::string result, name;
  for (const char* type : types) {
    result += (result.empty() ? "" : ", ") + std::string(type);
    if (left >> name) result += " " + name.substr(0, name.find(','));
  }
  return result;
}

const char* signature_in(const Listed* const* first, const Listed* const* last, const char* name) {
  static thread_local std::string answer;
  const auto* found = std::find_if(
      first, last, [name](const Listed* one) { return std::strcmp(one->name, name) == 0; });
  if (found == last) return nullptr;
  answer = (*found)->signature();
  return answer.c_str();
}

}  // namespace softnpu
