// torch_npu's task queue: work handed to it runs after everything that torch_npu was asked for
// before.
#pragma once

#include <functional>
#include <string>

namespace dsv4::npu {

// The stream behind a c10::Stream of the NPU, as torch_npu's NPUStream holds one.
using C10Stream = const void*;

// Runs `task`, which gets the stream and returns an ACL code, in stream order. It must not throw.
// `name` is what profilers and torch_npu's errors show. With a queue, it runs later and in another
// thread.
void enqueue(const std::string& name, C10Stream stream,
             const std::function<int(void* stream)>& task);

}  // namespace dsv4::npu
