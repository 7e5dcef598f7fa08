#include "rms_norm.h"

#include <algorithm>

#include "common/threads.h"

#define DSV4_ROWS "cpu/rms_norm_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

constexpr int64_t kElementsPerThread =
    32768;  // below, waking a second thread costs more than it saves

void rms_norm(const RmsNorm& call, Isa isa) {
  if (call.x_rows.count() == 0 || call.x_rows.width() == 0) {
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / call.x_rows.width());
  const auto run = DSV4_FOR_ISA(isa, rms_norm_rows);
  parallel_for(call.x_rows.count(), grain,
               [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

}  // namespace dsv4::cpu
