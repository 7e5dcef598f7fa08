#include "rms_norm.h"

#include <algorithm>

#include "common/isa.h"
#include "common/threads.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // below, waking a second thread costs more than it saves

auto implementation() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return &rms_norm_avx512;
    case Isa::avx2:
      return &rms_norm_avx2;
#endif
    default:
      return &rms_norm_portable;
  }
}

}  // namespace

void rms_norm(const RmsNorm& call) {
  if (call.x_rows.count() == 0 || call.x_rows.width() == 0) {
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / call.x_rows.width());
  const auto run = implementation();
  parallel_for(call.x_rows.count(), grain, [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

}  // namespace dsv4::cpu
