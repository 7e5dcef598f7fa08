// Which device this thread works on.
#pragma once

#include "abi.h"

namespace softnpu {

SOFTNPU_CXX int current_device();  // -1: none was set on this thread
SOFTNPU_CXX int require_device();  // throws Fault(kNoContext)
void set_current_device(int device);
SOFTNPU_CXX bool reaches(int device, int peer);  // after aclrtDeviceEnablePeerAccess

}  // namespace softnpu
