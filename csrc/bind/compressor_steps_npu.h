// The compressor's pooling by torch's own operators, for chips and shapes that have no function of
// their own; as a step of a decode graph it reads no value on the host.
#pragma once

#include "npu_call.h"

namespace dsv4::bind {

struct PoolInSteps {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& wkv,
                        const at::Tensor& wgate, const at::Tensor& ape, const at::Tensor& state,
                        const at::Tensor& table, const at::Tensor& starts, const at::Tensor& ends,
                        int64_t max_seq_len, int64_t head_dim);
  static at::Tensor run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                        const at::Tensor& ape, const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor& starts, const at::Tensor& ends, int64_t max_seq_len,
                        int64_t head_dim);
};

}  // namespace dsv4::bind
