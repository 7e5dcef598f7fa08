// What the device is: read once from SOFTNPU_* environment variables, which `dsv4-ascend softnpu` and the Python API
// set.
#pragma once

#include <string>

#include "abi.h"

namespace softnpu {

struct Config {
  std::string soc;      // SOFTNPU_SOC
  std::string cann;     // SOFTNPU_CANN
  int devices;          // SOFTNPU_DEVICES
  size_t memory;        // SOFTNPU_MEMORY, bytes of each device
  size_t workspace;     // SOFTNPU_WORKSPACE, bytes that every operator asks for
  uint64_t chaos;       // SOFTNPU_CHAOS, seed; 0 = none
  std::string trace;    // SOFTNPU_TRACE, "" = none; %p becomes the process id
  std::string problem;  // why the settings are refused; aclInit reports it
};

SOFTNPU_CXX const Config& config();

enum class Generation { kA2, kA3, kA5 };  // Ascend 910B, 910_93, 950

SOFTNPU_CXX Generation generation();

}  // namespace softnpu
