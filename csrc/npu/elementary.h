// aclnn functions of torch's own operators that launchers call with other dtypes than torch would.
#pragma once

#include "function.h"

namespace dsv4::npu {

inline constexpr std::array kEverywhere = {Version{Package::builtin, kAllChips, {8, 0}}};

struct Add {  // self + alpha * other, broadcast; 16-bit sums are rounded once
  static constexpr const char* symbol = "aclnnAdd";
  static constexpr std::array versions = kEverywhere;
  In self, other;
  Scalar alpha;
  Out out;
  DSV4_ARGUMENTS(self, other, alpha, out)
};

struct Cast {
  static constexpr const char* symbol = "aclnnCast";
  static constexpr std::array versions = kEverywhere;
  In self;
  DataType dtype;
  Out out;
  DSV4_ARGUMENTS(self, dtype, out)
};

struct Mean {  // over dims; summed and returned in dtype
  static constexpr const char* symbol = "aclnnMean";
  static constexpr std::array versions = kEverywhere;
  In self;
  Ints dim;
  Flag keep_dim;
  DataType dtype;
  Out out;
  DSV4_ARGUMENTS(self, dim, keep_dim, dtype, out)
};

struct ArgMax {  // the first index of the largest value, int64
  static constexpr const char* symbol = "aclnnArgMax";
  static constexpr std::array versions = kEverywhere;
  In self;
  Int dim;
  Flag keep_dim;
  Out out;
  DSV4_ARGUMENTS(self, dim, keep_dim, out)
};

}  // namespace dsv4::npu
