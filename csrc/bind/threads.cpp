// The kernels' threads are torch's, so that both never run at once and torch.set_num_threads holds
// for both.
#include "common/threads.h"

#include <ATen/Parallel.h>

#ifndef INTRA_OP_PARALLEL
// Nothing is linked: torch brings the runtime.
#error "at::parallel_for is serial without OpenMP: compile with -fopenmp"
#endif

void dsv4::parallel_for(int64_t count, int64_t grain,
                        const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, grain, body);
}
