// A shared library that may be absent, and its symbols.
#pragma once

#include <memory>
#include <string>

namespace dsv4::npu {

// Stays open as long as it, or a copy of it, is used.
class SharedLibrary {
 public:
  static SharedLibrary open(const std::string& file);    // not open if the loader does not find it
  static SharedLibrary loaded(const std::string& file);  // only if the process has it already

  explicit operator bool() const { return handle_ != nullptr; }

  // A symbol found through this library, in it or in what it needs; nullptr without one.
  void* find(const std::string& symbol) const;

  // A symbol that this very file defines: equal names of other packages in the process do not
  // count.
  void* own(const std::string& symbol) const;

 private:
  explicit SharedLibrary(void* handle);

  std::shared_ptr<void> handle_;
  std::string file_;
};

}  // namespace dsv4::npu
