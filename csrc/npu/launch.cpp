#include "launch.h"

#include <algorithm>

#include "common/error.h"

namespace dsv4::npu {
namespace {

// libnnopbase.so holds the descriptors; where it does not, it is a shim over the runtime that does.
struct Runtime {
  CreateTensor create_tensor;
  DestroyTensor destroy_tensor;
  CreateIntArray create_int_array;
  DestroyIntArray destroy_int_array;
  RecentErrorText recent_error;

  static const Runtime& here() {
    static const Runtime runtime = [] {
      const SharedLibrary base = SharedLibrary::open("libnnopbase.so");
      const SharedLibrary acl = SharedLibrary::open("libascendcl.so");
      const auto find = [&](const char* symbol) {
        void* found = base.find(symbol);
        found = found == nullptr ? acl.find(symbol) : found;
        if (found == nullptr) {
          throw LaunchError(std::string("CANN's libnnopbase.so and libascendcl.so have no ") + symbol);
        }
        return found;
      };
      return Runtime{reinterpret_cast<CreateTensor>(find("aclCreateTensor")),
                     reinterpret_cast<DestroyTensor>(find("aclDestroyTensor")),
                     reinterpret_cast<CreateIntArray>(find("aclCreateIntArray")),
                     reinterpret_cast<DestroyIntArray>(find("aclDestroyIntArray")),
                     reinterpret_cast<RecentErrorText>(find("aclGetRecentErrMsg"))};
    }();
    return runtime;
  }
};

}  // namespace

Descriptors::Descriptors() { Runtime::here(); }

Descriptors::~Descriptors() {
  const Runtime& runtime = Runtime::here();
  std::for_each(tensors_.begin(), tensors_.end(), runtime.destroy_tensor);
  std::for_each(arrays_.begin(), arrays_.end(), runtime.destroy_int_array);
}

AclTensor* Descriptors::tensor(const View& view) {
  AclTensor* made = Runtime::here().create_tensor(view.sizes.data(), view.sizes.size(), view.type, view.strides.data(),
                                                  view.offset, AclFormat::nd, &view.storage_elements, 1, view.storage);
  tensors_.push_back(made);
  return made;
}

AclIntArray* Descriptors::make(const Ints& argument) {
  AclIntArray* made = Runtime::here().create_int_array(argument.values.data(), argument.values.size());
  arrays_.push_back(made);
  return made;
}

void refuse(const Site& site, const char* symbol, Package package, int code) {
  const char* text = Runtime::here().recent_error();
  throw LaunchError(std::string("dsv4::") + site.op + ": " + symbol + " (" + package_name(package) + ") on " +
                    site.machine->chip + " with CANN " + site.machine->cann + " refused the call with code " +
                    std::to_string(code) + ": " + (text == nullptr ? "no text" : text));
}

void finish(const Site& site, Prepared prepared) {
  void* workspace = prepared.workspace == 0 ? nullptr : site.workspace(prepared.workspace);
  enqueue(std::string("dsv4_") + site.op, site.stream, [prepared = std::move(prepared), workspace](void* stream) {
    return prepared.function.phase2(workspace, prepared.workspace, prepared.executor, stream);
  });
}

}  // namespace dsv4::npu
