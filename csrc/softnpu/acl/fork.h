// A child of fork() has none of the worker threads and keeps the locks that they held: every call
// is refused there.
#pragma once

#include "abi.h"

namespace softnpu {

void watch_forks();         // from the first worker thread on
SOFTNPU_CXX bool forked();  // this process is such a child

}  // namespace softnpu
