// Matrix products that several launchers share.
#pragma once

#include "npu_call.h"

namespace dsv4::bind {

// fp32 [T, N] of rows [T, K] and the weight [N, K] of the same dtype: products of bf16 are exact,
// and nothing rounds their fp32 sums.
at::Tensor single_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight);

// The same for dtypes that may differ, in fp32 then.
at::Tensor product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight);

}  // namespace dsv4::bind
