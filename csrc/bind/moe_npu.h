// Routing of quantised rows to experts and their sum, as steps of launchers.
#pragma once

#include <ATen/ops/empty.h>

#include "npu/moe.h"
#include "npu_call.h"

namespace dsv4::bind {

// Rows or codes [T, K] once per choice of ids [T, k], sorted by expert, codes with their scales
// [T, ..]; where each choice went; rows per expert, int64.
struct Routed {
  at::Tensor rows, scales, to_row, counts;

  Routed(const NpuCall& call, const at::Tensor& codes, const std::optional<at::Tensor>& of_codes,
         const at::Tensor& ids, int64_t experts)
      : rows(once_per_choice(codes, ids)),
        scales(of_codes ? once_per_choice(*of_codes, ids)
                        : at::empty({ids.numel()}, ids.options().dtype(at::kFloat))),
        to_row(at::empty({ids.numel()}, ids.options())),
        counts(at::empty({experts}, ids.options().dtype(at::kLong))) {
    using Init = npu::MoeInitRouting;
    call.launch(Init{call.in(codes),
                     call.in(ids),
                     call.maybe(of_codes ? &*of_codes : nullptr),
                     {},
                     ids.numel(),
                     int64_t{-1},
                     experts,
                     Init::kEveryRow,
                     Init::kCounts,
                     true,
                     Init::kUnquantised,
                     {{0, experts}},
                     Init::kToRow,
                     call.out(rows),
                     call.out(to_row),
                     call.out(counts),
                     call.out(scales)});
  }

 private:
  static at::Tensor once_per_choice(const at::Tensor& of_tokens, const at::Tensor& ids) {
    std::vector<int64_t> sizes = of_tokens.sizes().vec();
    sizes.front() = ids.numel();
    return at::empty(sizes, of_tokens.options());
  }
};

// [T, d]: the shared expert's rows, then those of each choice times its weight [T, k], in fp32.
inline at::Tensor summed(const NpuCall& call, const at::Tensor& chosen, const at::Tensor& to_row,
                         const at::Tensor& shared, const at::Tensor& weights) {
  const at::Tensor out = at::empty(shared.sizes(), shared.options());
  const at::Tensor factors = weights.contiguous();
  call.launch(npu::MoeFinalizeRouting{call.in(chosen),
                                      call.in(to_row),
                                      call.maybe(&shared),
                                      {},
                                      {},
                                      call.maybe(&factors),
                                      {},
                                      npu::MoeFinalizeRouting::kTokenMajor,
                                      call.out(out)});
  return out;
}

}  // namespace dsv4::bind
