#include "launch.h"

#include <algorithm>

#include "common/error.h"

namespace dsv4::npu {
namespace {

// libnnopbase.so holds the descriptors; where it does not, it is a shim over the runtime that does.
struct Runtime {
  SharedLibrary base;  // kept open: the addresses are theirs
  SharedLibrary acl;
  CreateTensor create_tensor = nullptr;
  DestroyTensor destroy_tensor = nullptr;
  CreateTensorList create_list = nullptr;
  DestroyTensorList destroy_list = nullptr;
  CreateIntArray create_array = nullptr;
  DestroyIntArray destroy_array = nullptr;
  CreateScalar create_scalar = nullptr;
  DestroyScalar destroy_scalar = nullptr;
  RecentErrorText recent_error = nullptr;

  static const Runtime& here() {
    static const Runtime runtime = [] {
      SharedLibrary base = SharedLibrary::open("libnnopbase.so");
      SharedLibrary acl = SharedLibrary::open("libascendcl.so");
      Runtime made{base, acl};
      const auto find = [&]<class Symbol>(const char* name, Symbol& symbol) {
        void* found = base.find(name);
        found = found == nullptr ? acl.find(name) : found;
        if (found == nullptr) {
          throw LaunchError(std::string("CANN's libnnopbase.so and libascendcl.so have no ") +
                            name);
        }
        symbol = reinterpret_cast<Symbol>(found);
      };
      find("aclCreateTensor", made.create_tensor);
      find("aclDestroyTensor", made.destroy_tensor);
      find("aclCreateTensorList", made.create_list);
      find("aclDestroyTensorList", made.destroy_list);
      find("aclCreateIntArray", made.create_array);
      find("aclDestroyIntArray", made.destroy_array);
      find("aclCreateScalar", made.create_scalar);
      find("aclDestroyScalar", made.destroy_scalar);
      find("aclGetRecentErrMsg", made.recent_error);
      return made;
    }();
    return runtime;
  }
};

std::string recent_error() {
  const char* text = Runtime::here().recent_error();
  return text == nullptr ? "no text" : text;
}

// As an optional argument a null descriptor would mean "absent".
template <class Made>
Made* made_or_throw(const char* function, Made* made) {
  if (made == nullptr) {
    throw LaunchError(std::string(function) + " made no descriptor: " + recent_error());
  }
  return made;
}

}  // namespace

Descriptors::Descriptors() { Runtime::here(); }

Descriptors::~Descriptors() {
  const Runtime& runtime = Runtime::here();
  std::for_each(tensors_.begin(), tensors_.end(), runtime.destroy_tensor);
  std::for_each(lists_.begin(), lists_.end(), runtime.destroy_list);
  std::for_each(arrays_.begin(), arrays_.end(), runtime.destroy_array);
  std::for_each(scalars_.begin(), scalars_.end(), runtime.destroy_scalar);
}

AclTensor* Descriptors::tensor(const View& view) {
  const std::span<const int64_t> held =
      view.tiles.empty() ? std::span<const int64_t>(&view.storage_elements, 1) : view.tiles;
  AclTensor* made = Runtime::here().create_tensor(view.sizes.data(), view.sizes.size(), view.type,
                                                  view.strides.data(), view.offset, view.format,
                                                  held.data(), held.size(), view.storage);
  tensors_.push_back(made_or_throw("aclCreateTensor", made));
  return made;
}

AclTensorList* Descriptors::list(const std::vector<View>& views) {
  if (views.empty()) {
    return nullptr;
  }
  const size_t before = tensors_.size();
  for (const View& view : views) {
    tensor(view);
  }
  const std::vector<AclTensor*> members(tensors_.begin() + static_cast<ptrdiff_t>(before),
                                        tensors_.end());
  AclTensorList* made = Runtime::here().create_list(members.data(), members.size());
  lists_.push_back(made_or_throw("aclCreateTensorList", made));
  tensors_.resize(before);
  return made;
}

AclIntArray* Descriptors::array(const std::vector<int64_t>& values) {
  AclIntArray* made = Runtime::here().create_array(values.data(), values.size());
  arrays_.push_back(made_or_throw("aclCreateIntArray", made));
  return made;
}

AclScalar* Descriptors::scalar(float value) {
  AclScalar* made = Runtime::here().create_scalar(&value, AclType::f32);
  scalars_.push_back(made_or_throw("aclCreateScalar", made));
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
