#include "launch.h"

#include <algorithm>

#include "common/error.h"

namespace dsv4::npu {
namespace {

// libnnopbase.so holds the descriptors; where it does not, it is a shim over the runtime that does.
struct Runtime {
  SharedLibrary base;  // kept open: the addresses are theirs
  SharedLibrary acl;
  CreateTensor create_tensor;
  DestroyTensor destroy_tensor;
  RecentErrorText recent_error;

  static const Runtime& here() {
    static const Runtime runtime = [] {
      SharedLibrary base = SharedLibrary::open("libnnopbase.so");
      SharedLibrary acl = SharedLibrary::open("libascendcl.so");
      const auto find = [&](const char* symbol) {
        void* found = base.find(symbol);
        found = found == nullptr ? acl.find(symbol) : found;
        if (found == nullptr) {
          throw LaunchError(std::string("CANN's libnnopbase.so and libascendcl.so have no ") +
                            symbol);
        }
        return found;
      };
      return Runtime{base, acl, reinterpret_cast<CreateTensor>(find("aclCreateTensor")),
                     reinterpret_cast<DestroyTensor>(find("aclDestroyTensor")),
                     reinterpret_cast<RecentErrorText>(find("aclGetRecentErrMsg"))};
    }();
    return runtime;
  }
};

std::string recent_error() {
  const char* text = Runtime::here().recent_error();
  return text == nullptr ? "no text" : text;
}

}  // namespace

Descriptors::Descriptors() { Runtime::here(); }

Descriptors::~Descriptors() {
  const Runtime& runtime = Runtime::here();
  std::for_each(tensors_.begin(), tensors_.end(), runtime.destroy_tensor);
}

AclTensor* Descriptors::tensor(const View& view) {
  AclTensor* made = Runtime::here().create_tensor(view.sizes.data(), view.sizes.size(), view.type,
                                                  view.strides.data(), view.offset, AclFormat::nd,
                                                  &view.storage_elements, 1, view.storage);
  if (made == nullptr) {  // as an optional argument it would mean "absent"
    throw LaunchError(std::string("aclCreateTensor made no descriptor: ") + recent_error());
  }
  tensors_.push_back(made);
  return made;
}

void refuse(const Site& site, const char* symbol, Package package, int code) {
  throw LaunchError(std::string("dsv4::") + site.op + ": " + symbol + " (" + package_name(package) +
                    ") on " + site.machine->chip + " with CANN " + site.machine->cann +
                    " refused the call with code " + std::to_string(code) + ": " + recent_error());
}

void finish(const Site& site, Prepared prepared) {
  void* workspace = prepared.workspace == 0 ? nullptr : site.workspace(prepared.workspace);
  enqueue(std::string("dsv4_") + site.op, site.stream,
          [prepared = std::move(prepared), workspace](void* stream) {
            return prepared.function.phase2(workspace, prepared.workspace, prepared.executor,
                                            stream);
          });
}

}  // namespace dsv4::npu
