#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "npu/moe.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

constexpr int64_t kMostExperts = 10240;

// FP8 codes and scales move as bytes: every chip copies int8.
bool is_byte(const at::Tensor& x) { return x.element_size() == 1; }
at::Tensor as_moved(const at::Tensor& x) { return is_byte(x) ? x.view(at::kChar) : x; }

struct Dispatch {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& ids,
                        int64_t experts) {
    return first(is_byte(x) ? WhyNot() : not_of("x", x, kFloats), not_of("ids", ids, {at::kInt}),
                 unless(x.dim() == 2, "the chip takes rows [T, K]"), empty("x", x),
                 unless(experts <= kMostExperts, "the chip takes at most 10240 experts"));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x,
                                                            const at::Tensor& ids,
                                                            int64_t experts) {
    const at::Tensor from = as_moved(x);
    const int64_t pairs = ids.numel();
    const at::Tensor rows = at::empty({pairs, x.size(1)}, from.options());
    at::Tensor order = at::empty({pairs}, ids.options());
    const at::Tensor ends = at::empty({experts}, ids.options().dtype(at::kLong));
    const at::Tensor unused_scale = at::empty({pairs}, ids.options().dtype(at::kFloat));
    const NpuCall call("moe_dispatch", x);
    call.launch(npu::MoeInitRouting{call.in(from),
                                    call.in(ids),
                                    {},
                                    {},
                                    pairs,
                                    int64_t{-1},
                                    experts,
                                    npu::MoeInitRouting::kEveryRow,
                                    npu::MoeInitRouting::kPrefixSums,
                                    true,
                                    npu::MoeInitRouting::kUnquantised,
                                    {{0, experts}},
                                    npu::MoeInitRouting::kFromRow,
                                    call.out(rows),
                                    call.out(order),
                                    call.out(ends),
                                    call.out(unused_scale)});
    at::Tensor offsets = at::zeros({experts + 1}, ids.options());
    offsets.narrow(0, 1, experts).copy_(ends);
    return {rows.view(x.scalar_type()), offsets, order};
  }
};

struct MoeCombine {
  static WhyNot why_not(const Context&, const at::Tensor& y, const at::Tensor& order, int64_t) {
    return first(not_of("y", y, kFloats), not_of("order", order, {at::kInt}), empty("y", y));
  }

  static at::Tensor run(const at::Tensor& y, const at::Tensor& order, int64_t k) {
    const int64_t pairs = y.size(0), tokens = pairs / k;
    const at::Tensor rows = y.to(at::kFloat);
    const at::Tensor to_row =
        at::empty({pairs}, order.options())
            .scatter_(0, order.to(at::kLong), at::arange(pairs, order.options()));
    const at::Tensor ones = at::ones({tokens, k}, rows.options());
    at::Tensor sums = at::empty({tokens, y.size(1)}, rows.options());
    const NpuCall call("moe_combine", y);
    call.launch(npu::MoeFinalizeRouting{call.in(rows),
                                        call.in(to_row),
                                        {},
                                        {},
                                        {},
                                        call.maybe(&ones),
                                        {},
                                        npu::MoeFinalizeRouting::kTokenMajor,
                                        call.out(sums)});
    return sums;
  }
};

const NpuRegistration<Dispatch, npu::MoeInitRouting> moe_dispatch("moe_dispatch", Kind::composite);
const NpuRegistration<MoeCombine, npu::MoeFinalizeRouting> moe_combine("moe_combine",
                                                                       Kind::composite);

}  // namespace
}  // namespace dsv4::bind
