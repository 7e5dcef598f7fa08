#include "packages.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace dsv4::npu {
namespace {

namespace fs = std::filesystem;

constexpr std::array kNames = {"builtin", "vllm-ascend", "recipes"};

// Functions by which a vendor's library is known, asked in this order: each of the first stands in
// one package's sources alone, aclnnHcPre in those of both (spec/ascend-operators.md 1.1, 12.15).
struct Marker {
  Package package;
  const char* symbol;
};
constexpr std::array kMarkers = {
    Marker{Package::vllm_ascend, "aclnnVllmQuantLightningIndexerGetWorkspaceSize"},
    Marker{Package::recipes, "aclnnQuantCompressorGetWorkspaceSize"},
    Marker{Package::recipes, "aclnnScatterNdUpdateAscGetWorkspaceSize"},
    Marker{Package::recipes, "aclnnMoeInitRoutingGroupQuantGetWorkspaceSize"},
    Marker{Package::vllm_ascend, "aclnnHcPreGetWorkspaceSize"},
};

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (!part.empty()) {
      parts.push_back(part);
    }
  }
  return parts;
}

// torch_npu loads a vendor's library only if root or the user owns it; so do we.
bool is_trusted(const std::string& file) {
  struct stat status{};
  return stat(file.c_str(), &status) == 0 && (status.st_uid == 0 || status.st_uid == geteuid());
}

std::optional<Package> vendor_of(const SharedLibrary& library) {
  const auto known = std::find_if(kMarkers.begin(), kMarkers.end(), [&](const Marker& marker) {
    return library.own(marker.symbol) != nullptr;
  });
  return known == kMarkers.end() ? std::nullopt : std::optional(known->package);
}

std::vector<SharedLibrary> builtin_libraries(const std::string& home) {
  std::vector<SharedLibrary> libraries;
  std::error_code error;
  auto entry =
      home.empty() ? fs::directory_iterator() : fs::directory_iterator(home + "/lib64", error);
  for (; entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename();
    if (name.starts_with("libopapi_") && name.ends_with(".so") && is_trusted(entry->path())) {
      libraries.push_back(SharedLibrary::open(entry->path()));
    }
  }
  libraries.push_back(SharedLibrary::open("libopapi.so"));
  std::erase_if(libraries, [](const SharedLibrary& library) { return !library; });
  return libraries;
}

}  // namespace

const char* package_name(Package package) { return kNames.at(static_cast<size_t>(package)); }

Package package_named(const std::string& name) {
  for (const Package package : kPackages) {
    if (name == package_name(package)) {
      return package;
    }
  }
  throw std::invalid_argument("operator package '" + name +
                              "' is not builtin, vllm-ascend or recipes");
}

std::vector<std::string> vendor_folders(const std::string& custom, const std::string& opp) {
  std::vector<std::string> folders = split(custom, ':');
  std::ifstream config(opp + "/vendors/config.ini");
  for (std::string line; std::getline(config, line);) {
    constexpr std::string_view key = "load_priority=";
    if (line.starts_with(key)) {
      for (const std::string& vendor : split(line.substr(key.size()), ',')) {
        folders.push_back(opp + "/vendors/" + vendor);
      }
    }
  }
  return folders;
}

Packages::Packages() {
  libraries_[static_cast<size_t>(Package::builtin)] =
      builtin_libraries(variable("ASCEND_HOME_PATH"));
  for (const auto& folder :
       vendor_folders(variable("ASCEND_CUSTOM_OPP_PATH"), variable("ASCEND_OPP_PATH"))) {
    const std::string file = folder + "/op_api/lib/libcust_opapi.so";
    if (!is_trusted(file)) {
      continue;
    }
    SharedLibrary library = SharedLibrary::open(file);
    if (const auto package = vendor_of(library)) {
      libraries_[static_cast<size_t>(*package)].push_back(std::move(library));
    }
  }
}

const Packages& Packages::here() {
  static const Packages packages;
  return packages;
}

std::vector<Package> Packages::found() const {
  std::vector<Package> packages;
  std::copy_if(kPackages.begin(), kPackages.end(), std::back_inserter(packages),
               [&](Package package) { return !libraries_[static_cast<size_t>(package)].empty(); });
  return packages;
}

void* Packages::find(Package package, const std::string& symbol) const {
  for (const SharedLibrary& library : libraries_[static_cast<size_t>(package)]) {
    if (void* found = library.own(symbol)) {
      return found;
    }
  }
  return nullptr;
}

}  // namespace dsv4::npu
