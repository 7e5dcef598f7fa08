// What the device is: read once from SOFTNPU_* environment variables, which `dsv4-ascend softnpu`
// and the Python API set.
#pragma once

#include <string>

#include "abi.h"

namespace softnpu {

struct Config {
  std::string soc = "Ascend910B3";  // SOFTNPU_SOC
  std::string cann = "9.1.0";       // SOFTNPU_CANN
  int devices = 8;                  // SOFTNPU_DEVICES
  size_t memory = 0;                // SOFTNPU_MEMORY, bytes of each device
  size_t workspace = 0;             // SOFTNPU_WORKSPACE, bytes that every operator asks for
  uint64_t chaos = 0;               // SOFTNPU_CHAOS, seed; 0 = none
  std::string trace;                // SOFTNPU_TRACE, "" = none; %p becomes the process id
  std::string problem;              // why the settings are refused; aclInit reports it
};

SOFTNPU_CXX const Config& config();
// What is expected of SOFTNPU_<name> when `value` is refused; "" when it is taken or no setting has
// that name.
std::string expected_instead(const std::string& name, const std::string& value);

enum class Generation { kA2, kA3, kA5 };  // Ascend 910B, 910_93, 950

SOFTNPU_CXX Generation generation();

}  // namespace softnpu
