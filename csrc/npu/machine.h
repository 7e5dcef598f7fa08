// Which chip, which CANN, which operator packages: this machine's, or one that is only asked about.
#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "packages.h"

namespace dsv4::npu {

enum class Generation : uint8_t { a2 = 1, a3 = 2, a5 = 4 };

// Ascend910B* is A2, Ascend910_93* is A3, Ascend950* is A5; "A2", "A3" and "A5" name themselves.
std::optional<Generation> generation_of(const std::string& chip);

// "9.1.0" and "8.5.0.alpha1" by their first two numbers; 0.0 for what is no version.
struct CannVersion {
  int major = 0;
  int minor = 0;

  auto operator<=>(const CannVersion&) const = default;
};
CannVersion cann_version(const std::string& text);

struct Machine {
  std::string chip;  // "Ascend910B3"; empty without an NPU
  std::string cann;  // "9.1.0"
  std::vector<Package> packages;
  bool here = false;  // symbols can be looked up
};

// The machine of this process; without a chip while torch_npu is not loaded.
Machine machine_here();

}  // namespace dsv4::npu
