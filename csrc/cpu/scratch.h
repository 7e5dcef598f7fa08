// Working memory of a kernel on one thread.
#pragma once

#include <cstddef>

namespace dsv4::cpu {

// `bytes` of this thread's own, aligned for any number, with any content, valid until the thread
// asks again. It grows only, so that a call that repeats allocates nothing.
void* scratch(std::size_t bytes);

}  // namespace dsv4::cpu
