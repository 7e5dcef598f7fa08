#include "queue.h"

#include <stdexcept>

#include "shared_library.h"

namespace dsv4::npu {
namespace {

// Members of torch_npu's classes by their mangled names: it is not there when this is built.
constexpr const char* kRunOpApi =
    "_ZN6at_npu6native9OpCommand10RunOpApiV2ERKNSt7__cxx1112basic_stringIcSt11char_"
    "traitsIcESaIcEEERKSt8functionIFivEEb";
constexpr const char* kStream = "_ZNK7c10_npu9NPUStream6streamEb";
constexpr const char* kDrainedStream = "_ZNK7c10_npu9NPUStream6streamEv";

struct TorchNpu {
  using RunOpApi = void (*)(const std::string& name, const std::function<int()>& task, bool sync);
  using Stream = void* (*)(C10Stream self, bool drain);
  using DrainedStream = void* (*)(C10Stream self);

  RunOpApi run = nullptr;
  Stream stream = nullptr;
  DrainedStream drained_stream = nullptr;

  static const TorchNpu& here() {
    static const TorchNpu found = [] {
      const SharedLibrary library = SharedLibrary::loaded("libtorch_npu.so");
      return TorchNpu{reinterpret_cast<RunOpApi>(library.find(kRunOpApi)),
                      reinterpret_cast<Stream>(library.find(kStream)),
                      reinterpret_cast<DrainedStream>(library.find(kDrainedStream))};
    }();
    return found;
  }
};

}  // namespace

void enqueue(const std::string& name, C10Stream stream,
             const std::function<int(void* stream)>& task) {
  const TorchNpu& torch_npu = TorchNpu::here();
  if (torch_npu.run != nullptr && torch_npu.stream != nullptr) {
    void* raw = torch_npu.stream(stream, false);
    torch_npu.run(name, [task, raw] { return task(raw); }, false);
    return;
  }
  // Never the bare stream: it would overtake what is still queued.
  if (torch_npu.drained_stream == nullptr) {
    throw std::runtime_error(name +
                             ": this torch_npu exports neither its task queue nor its streams");
  }
  if (const int code = task(torch_npu.drained_stream(stream))) {
    throw std::runtime_error(name + ": the launch failed with code " + std::to_string(code));
  }
}

}  // namespace dsv4::npu
