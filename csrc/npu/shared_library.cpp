#include "shared_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>

namespace dsv4::npu {
namespace {

std::string real_path(const char* path) {
  const std::unique_ptr<char, decltype(&std::free)> resolved(realpath(path, nullptr), &std::free);
  return resolved ? resolved.get() : path;
}

}  // namespace

SharedLibrary::SharedLibrary(void* handle) {
  if (handle == nullptr) {
    return;
  }
  handle_ = std::shared_ptr<void>(handle, [](void* open) { dlclose(open); });
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr) {
    file_ = real_path(map->l_name);
  }
}

SharedLibrary SharedLibrary::open(const std::string& file) {
  return SharedLibrary(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL));
}

SharedLibrary SharedLibrary::loaded(const std::string& file) {
  return SharedLibrary(dlopen(file.c_str(), RTLD_NOW | RTLD_NOLOAD));
}

void* SharedLibrary::find(const std::string& symbol) const {
  return handle_ ? dlsym(handle_.get(), symbol.c_str()) : nullptr;
}

void* SharedLibrary::own(const std::string& symbol) const {
  void* found = find(symbol);
  Dl_info where{};
  if (found == nullptr || dladdr(found, &where) == 0 || real_path(where.dli_fname) != file_) {
    return nullptr;
  }
  return found;
}

}  // namespace dsv4::npu
