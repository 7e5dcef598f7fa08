// Operator packages for Ascend: who brings which aclnn function. Equal names have different
// signatures in different packages, so a function is asked of a package, never of the process.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "shared_library.h"

namespace dsv4::npu {

enum class Package { builtin, vllm_ascend, recipes };
inline constexpr std::array kPackages = {Package::builtin, Package::vllm_ascend, Package::recipes};

const char* package_name(Package package);
Package package_named(const std::string& name);  // std::invalid_argument for another name

// The libraries of the packages that this process can use, searched once, in torch_npu's order.
class Packages {
 public:
  static const Packages& here();

  std::vector<Package> found() const;

  // The address of a function in a package's own libraries; nullptr where they have none.
  void* find(Package package, const std::string& symbol) const;

 private:
  Packages();

  std::array<std::vector<SharedLibrary>, kPackages.size()> libraries_;
};

// Folders of vendors that may hold op_api/lib/libcust_opapi.so, best first.
// custom: ASCEND_CUSTOM_OPP_PATH; opp: ASCEND_OPP_PATH.
std::vector<std::string> vendor_folders(const std::string& custom, const std::string& opp);

}  // namespace dsv4::npu
