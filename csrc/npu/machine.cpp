#include "machine.h"

#include <array>
#include <cstdio>

namespace dsv4::npu {
namespace {

std::string installed_cann(const SharedLibrary& runtime) {
  constexpr int package_of_cann = 0;  // ACL_PKG_NAME_CANN
  std::array<char, 1024> answer{};    // aclCANNPackageVersion begins with char version[128]
  using Version = int (*)(int package, char* version);
  const auto version = reinterpret_cast<Version>(runtime.find("aclsysGetCANNVersion"));
  const bool known = version != nullptr && version(package_of_cann, answer.data()) == 0;
  return known ? answer.data() : "";
}

}  // namespace

std::optional<Generation> generation_of(const std::string& chip) {
  struct Family {
    const char* prefix;
    const char* name;
    Generation generation;
  };
  constexpr std::array families = {Family{"Ascend910_93", "A3", Generation::a3},
                                   Family{"Ascend910B", "A2", Generation::a2},
                                   Family{"Ascend950", "A5", Generation::a5}};
  for (const Family& family : families) {
    if (chip.starts_with(family.prefix) || chip == family.name) {
      return family.generation;
    }
  }
  return std::nullopt;
}

CannVersion cann_version(const std::string& text) {
  CannVersion version;
  std::sscanf(text.c_str(), "%d.%d", &version.major, &version.minor);
  return version;
}

Machine machine_here() {
  Machine machine;
  const SharedLibrary runtime = SharedLibrary::loaded("libascendcl.so");
  using SocName = const char* (*)();
  const auto soc_name = reinterpret_cast<SocName>(runtime.find("aclrtGetSocName"));
  if (!SharedLibrary::loaded("libtorch_npu.so") || soc_name == nullptr) {
    return machine;
  }
  const char* chip = soc_name();
  machine.chip = chip == nullptr ? "" : chip;
  machine.cann = installed_cann(runtime);
  machine.packages = Packages::here().found();
  machine.here = true;
  return machine;
}

}  // namespace dsv4::npu
