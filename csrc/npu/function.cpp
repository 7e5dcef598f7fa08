#include "function.h"

#include <algorithm>

#include "common/error.h"

namespace dsv4::npu {
namespace {

bool has(const Machine& machine, Package package) {
  return std::find(machine.packages.begin(), machine.packages.end(), package) !=
         machine.packages.end();
}

bool is_documented(const Version& version, const Machine& machine, Generation generation) {
  return (version.chips & static_cast<uint8_t>(generation)) != 0 &&
         cann_version(machine.cann) >= version.since;
}

void* phase1_of(const char* symbol, Package package) {
  return Packages::here().find(package, std::string(symbol) + "GetWorkspaceSize");
}

std::string chips(uint8_t mask) {
  std::string text;
  for (const auto& [bit, name] :
       {std::pair{kA2, "A2"}, std::pair{kA3, "A3"}, std::pair{kA5, "A5"}}) {
    if ((mask & bit) != 0) {
      text += (text.empty() ? "" : ", ") + std::string(name);
    }
  }
  return text;
}

// "builtin on A5 from CANN 9.0 on"
std::string where(const Version& version) {
  return std::string(package_name(version.package)) + " on " + chips(version.chips) +
         " from CANN " + std::to_string(version.since.major) + "." +
         std::to_string(version.since.minor) + " on";
}

}  // namespace

std::string missing(const char* symbol, std::span<const Version> versions, const Machine& machine) {
  const auto generation = generation_of(machine.chip);
  if (!generation) {
    return machine.chip.empty() ? "no Ascend chip"
                                : "chip '" + machine.chip + "' is none of A2, A3, A5";
  }
  for (const Version& version : versions) {
    if (has(machine, version.package) && is_documented(version, machine, *generation) &&
        (!machine.here || phase1_of(symbol, version.package) != nullptr)) {
      return {};
    }
  }
  return std::string(symbol) + " is not on " + machine.chip + " with CANN " + machine.cann + " (" +
         documented(versions) + ")";
}

std::string documented(std::span<const Version> versions) {
  std::string known;
  for (const Version& version : versions) {
    known += (known.empty() ? "" : "; ") + where(version);
  }
  return known;
}

std::string expected(std::span<const Version> versions, const Machine& machine) {
  const auto generation = generation_of(machine.chip);
  for (const Version& version : versions) {
    if (generation && is_documented(version, machine, *generation)) {
      return package_name(version.package);
    }
  }
  return {};
}

Resolved resolve(const char* symbol, std::span<const Version> versions, const Machine& machine) {
  const auto generation = generation_of(machine.chip);
  for (const Version& version : versions) {
    if (generation && is_documented(version, machine, *generation)) {
      void* phase1 = phase1_of(symbol, version.package);
      void* phase2 = Packages::here().find(version.package, symbol);
      if (phase1 != nullptr && phase2 != nullptr) {
        return {phase1, reinterpret_cast<Phase2>(phase2), version.package};
      }
    }
  }
  return {};
}

Resolved resolve_or_throw(const char* symbol, std::span<const Version> versions,
                          const Machine& machine) {
  const Resolved found = resolve(symbol, versions, machine);
  if (found.phase1 == nullptr) {
    throw LaunchError(missing(symbol, versions, machine));
  }
  return found;
}

std::string declared(std::span<const char* const> types, std::string_view names) {
  std::string text;
  for (const char* type : types) {
    const size_t end = std::min(names.find(", "), names.size());
    text +=
        (text.empty() ? "" : ", ") + std::string(type) + " " + std::string(names.substr(0, end));
    names.remove_prefix(std::min(end + 2, names.size()));
  }
  return text;
}

std::vector<Listed>& listed() {
  static std::vector<Listed> functions;
  return functions;
}

}  // namespace dsv4::npu
