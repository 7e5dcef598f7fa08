// Live objects behind the opaque handles of one kind.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "abi.h"
#include "report.h"

namespace softnpu {

template <class T>
class Registry {
 public:
  Handle add(std::shared_ptr<T> object) {
    std::lock_guard lock(mutex_);
    const Handle handle = object.get();
    all_[handle] = std::move(object);
    return handle;
  }
  std::shared_ptr<T> find(Handle handle, const char* what) {
    std::lock_guard lock(mutex_);
    const auto found = all_.find(handle);
    if (found == all_.end()) throw Fault(kHandle, std::string("softnpu: not a live ") + what);
    return found->second;
  }
  // The object itself may live on: a queue holds it.
  std::shared_ptr<T> remove(Handle handle, const char* what) {
    std::lock_guard lock(mutex_);
    const auto found = all_.find(handle);
    if (found == all_.end())
      throw Fault(kHandle, std::string("softnpu: not a live ") + what + " (destroyed twice?)");
    std::shared_ptr<T> last = std::move(found->second);
    all_.erase(found);
    return last;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Handle, std::shared_ptr<T>> all_;
};

}  // namespace softnpu
