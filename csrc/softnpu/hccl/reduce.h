// Reduction of the ranks' parts, in rank order on every rank, so that all see the same bits.
#pragma once

#include <cstddef>
#include <vector>

#include "types.h"

namespace softnpu::hccl {

void reduce(const std::vector<const unsigned char*>& parts, unsigned char* to, size_t count,
            int dtype, int operation);

}  // namespace softnpu::hccl
