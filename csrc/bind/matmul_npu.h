// Matrix products that several launchers share.
#pragma once

#include "npu_call.h"

namespace dsv4::bind {

// Rows [T, K] times the transposed weight [.., N, K] as the products want it: a view [.., K, N].
at::Tensor columns(const at::Tensor& weight);

// [T, N] of x [T, K] and weight [.., N, K].
at::Tensor rows_out(const at::Tensor& x, const at::Tensor& weight, at::ScalarType type);

// Which rows are of which group, int64 [E]: their ends, or their counts.
struct Groups {
  at::Tensor list;
  int64_t type;

  static Groups counted(const at::Tensor& counts);
  // Of int32 offsets [E+1] that begin with 0.
  static Groups between(const at::Tensor& offsets);
};

// Of a product's operands; undefined where an operand has none.
struct Scales {
  at::Tensor x, weight;
};

// out [T, N]: rows x [T, K] sorted by group, each times the weight [E, N, K] of its group.
void grouped_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                     const Groups& groups, const at::Tensor& out, const Scales& scales = {});

// The products of rows x [T, K] with two weights [N, K] of the same dtype, into a result of each.
void paired_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& first_weight,
                    const at::Tensor& second_weight, const at::Tensor& first_out,
                    const at::Tensor& second_out);

// out [T, N] of int8 or MX rows x [T, K] and the weight [N, K], with the scales of both.
void quant_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                   const Scales& scales, int64_t group_size, const at::Tensor& out);

// fp32 [T, N], or out, of rows [T, K] and the weight [N, K] of the same dtype: products of bf16 are
// exact, and nothing rounds their fp32 sums.
void product_into(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                  const at::Tensor& out);
at::Tensor single_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight);

// The same for dtypes that may differ, in fp32 then.
at::Tensor product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight);

}  // namespace dsv4::bind
