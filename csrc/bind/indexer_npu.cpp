#include <ATen/ops/empty.h>

#include "npu/indexer.h"
#include "paged_npu.h"

namespace dsv4::bind {
namespace {

WhyNot not_selected(const Context& context, const at::Tensor& q, const at::Tensor& cache,
                    int64_t ratio, int64_t k) {
  const bool a5 = on_a5(context);
  return first(
      empty("q", q),
      unless(q.size(1) == 64 || (a5 && q.size(1) == 32), "the chip takes 64 heads, A5 also 32"),
      unless(q.size(2) == npu::kIndexWidth, "the chip takes heads of 128 channels"),
      unless(ratio == 1 || ratio == 4 || ratio == 128, "the chip takes ratio 1, 4 or 128"),
      unless(k <= 2048, "the chip chooses at most 2048 entries"), not_pages("k_cache", cache, a5));
}

constexpr int64_t kNoValues = 0;

// What both functions take and write, made ready for them.
struct Selection {
  at::Tensor q, k, weights;
  EntryLengths lengths;
  at::Tensor indices, no_values;

  Selection(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
            const at::Tensor& seq_lens, int64_t ratio, int64_t count, at::ScalarType values)
      : q(q.contiguous()),
        k(one_head(k_cache)),
        weights(weights.contiguous()),
        lengths(seq_lens, ratio),
        indices(at::empty({q.size(0), 1, count}, seq_lens.options())),
        no_values(at::empty({0}, q.options().dtype(values))) {}

  at::Tensor chosen() const { return indices.squeeze(1); }
};

struct Lightning {
  static WhyNot why_not(const Context& context, const at::Tensor& q, const at::Tensor& k_cache,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t ratio, int64_t k) {
    return first(not_of("q", q, kHalves), not_selected(context, q, k_cache, ratio, k),
                 unless(on_a5(context) || k_cache.is_contiguous(),
                        "k_cache has gaps, and the chip would copy it whole"));
  }

  static at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t ratio, int64_t k) {
    const Selection of(q, k_cache, weights, seq_lens, ratio, k, at::kFloat);
    const NpuCall call("lightning_indexer", q);
    call.launch(npu::LightningIndexer{call.in(of.q),
                                      call.in(of.k),
                                      call.in(of.weights),
                                      call.maybe(&query_start_loc),
                                      {},
                                      {},
                                      call.maybe(&of.lengths.entries),
                                      call.maybe(&of.lengths.residuals),
                                      call.maybe(&block_table),
                                      {},
                                      {},
                                      k,
                                      q.size(0),
                                      {"TND"},
                                      {"PA_BBND"},
                                      npu::kVisibleEntries,
                                      ratio,
                                      kNoValues,
                                      call.out(of.indices),
                                      call.out(of.no_values)});
    return of.chosen();
  }
};

// Both formats differ in the chips that have them and in the mode.
template <bool e4m3>
struct QuantLightning {
  static constexpr const char* op = e4m3 ? "lightning_indexer_fp8" : "lightning_indexer_int8";

  static WhyNot why_not(const Context& context, const at::Tensor& q, const at::Tensor&,
                        const at::Tensor& k_cache, const at::Tensor& k_scale, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                        int64_t ratio, int64_t k) {
    const bool a5 = on_a5(context);
    return first(unless(a5 == e4m3,
                        e4m3 ? "e4m3 keys exist on A5 only" : "int8 keys exist on A2 and A3 only"),
                 not_selected(context, q, k_cache, ratio, k), not_pages("k_scale", k_scale, a5));
  }

  static at::Tensor run(const at::Tensor& q, const at::Tensor& q_scale, const at::Tensor& k_cache,
                        const at::Tensor& k_scale, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t ratio, int64_t k) {
    using Indexer = npu::QuantLightningIndexer;
    const Selection of(q, k_cache, weights, seq_lens, ratio, k, at::kBFloat16);
    const at::Tensor of_queries = q_scale.contiguous(), of_keys = k_scale.unsqueeze(-1);
    const NpuCall call(op, q);
    call.launch(Indexer{call.in(of.q),
                        call.in(of.k),
                        call.in(of.weights),
                        call.in(of_queries),
                        call.in(of_keys),
                        call.maybe(&query_start_loc),
                        {},
                        {},
                        call.maybe(&of.lengths.entries),
                        call.maybe(&of.lengths.residuals),
                        call.maybe(&block_table),
                        {},
                        {},
                        k,
                        e4m3 ? Indexer::kE4m3 : Indexer::kInt8,
                        q.size(0),
                        {"TND"},
                        {"PA_BBND"},
                        npu::kVisibleEntries,
                        ratio,
                        kNoValues,
                        call.out(of.indices),
                        call.out(of.no_values)});
    return of.chosen();
  }
};

const NpuRegistration<Lightning, npu::LightningIndexer> lightning_indexer("lightning_indexer",
                                                                          Kind::composite);
const NpuRegistration<QuantLightning<false>, npu::QuantLightningIndexer> lightning_indexer_int8(
    QuantLightning<false>::op, Kind::composite);
const NpuRegistration<QuantLightning<true>, npu::QuantLightningIndexer> lightning_indexer_fp8(
    QuantLightning<true>::op, Kind::composite);

}  // namespace
}  // namespace dsv4::bind
