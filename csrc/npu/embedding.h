// aclnn functions of the embedding (spec/ascend-operators.md 4.1).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct Embedding {  // rows of weight
  static constexpr const char* symbol = "aclnnEmbedding";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {8, 0}}};
  In weight, indices;
  Out out;
  DSV4_ARGUMENTS(weight, indices, out)
};

}  // namespace dsv4::npu
