#include <ATen/ops/empty.h>

#include <cmath>

#include "npu/attention.h"
#include "paged_npu.h"

namespace dsv4::bind {
namespace {

constexpr int64_t kOnly = 1;  // key head
constexpr int64_t kNone = 0;

const at::Tensor* pointer(const Optional& tensor) { return tensor ? &*tensor : nullptr; }

WhyNot not_heads(int64_t heads, bool a5) {
  const bool power = (heads & (heads - 1)) == 0;
  return unless(power && heads <= 128 && heads >= (a5 ? 2 : 1),
                "the chip takes a power of two of heads, up to 128, on A5 from 2");
}

// The ratio goes with the kind of keys; `any_count`: of chosen entries.
WhyNot not_kind(const Optional& entries, const Optional& chosen, int64_t ratio, bool any_count) {
  if (!entries) {
    return {};
  }
  if (!chosen) {
    return unless(ratio == 128, "the chip takes all entries with ratio 128 only");
  }
  const int64_t k = chosen->size(1);
  return first(unless(ratio == 4, "the chip takes chosen entries with ratio 4 only"),
               unless(k > 0 && (any_count || k == 512 || k == 1024),
                      any_count ? "the chip takes at least one chosen entry"
                                : "the chip takes 512 or 1024 chosen entries"));
}

WhyNot not_keys(const at::Tensor& q, const at::Tensor& window_cache, const Optional& cmp_cache,
                bool a5) {
  return first(
      empty("q", q),
      unless(q.size(2) == npu::SparseFlashMla::kWidth, "the chip takes heads of 512 channels"),
      not_heads(q.size(1), a5), not_pages("window_cache", window_cache, a5),
      cmp_cache ? not_pages("cmp_cache", *cmp_cache, a5) : WhyNot());
}

// What both functions take and write, made ready for them.
struct Call {
  using Mla = npu::SparseFlashMla;
  const NpuCall& npu;
  const at::Tensor &sink, &window_table, &starts, &lengths;
  const Optional& cmp_table;
  int64_t max_seq_len, window, per_entry;
  at::Tensor rows, near, out;
  Optional far, indices;
  std::optional<EntryLengths> held;

  Call(const NpuCall& npu, const at::Tensor& q, const at::Tensor& sink, const at::Tensor& near,
       const at::Tensor& window_table, const Optional& cmp_cache, const Optional& cmp_table,
       const Optional& chosen, const at::Tensor& starts, const at::Tensor& lengths,
       int64_t max_seq_len, int64_t window, int64_t ratio)
      : npu(npu),
        sink(sink),
        window_table(window_table),
        starts(starts),
        lengths(lengths),
        cmp_table(cmp_table),
        max_seq_len(max_seq_len),
        window(window),
        per_entry(cmp_cache ? ratio : 1),
        rows(q.contiguous()),
        near(one_head(near)),
        out(at::empty(rows.sizes(), rows.options())) {
    if (cmp_cache) {
      far = one_head(*cmp_cache);
      held.emplace(lengths, ratio);
    }
    if (chosen && chosen->size(1)) {
      indices = chosen->unsqueeze(1).contiguous();
    }
  }

  npu::OptionalIn entries() const { return npu.maybe(held ? &held->entries : nullptr); }
  npu::OptionalIn residuals() const { return npu.maybe(held ? &held->residuals : nullptr); }

  // How the batch is split over cores: made by a function that all layers of a kind share.
  template <class Plan, class... Modes>
  at::Tensor metadata(Modes... modes) const {
    const std::vector<int64_t> numbers = {rows.size(0), rows.size(1), max_seq_len,     window,
                                          per_entry,    chosen(),     held.has_value()};
    const auto make = [&] {
      const at::Tensor made = at::empty({npu::kMetadata}, lengths.options());
      npu.launch(Plan{plan(made), modes...});
      return Tensors{made};
    };
    return Step::once({Plan::symbol, {starts, lengths}, numbers}, make).at(0);
  }

  int64_t chosen() const { return indices ? indices->size(2) : kNone; }

  npu::SparseFlashMlaMetadata plan(const at::Tensor& metadata) const {
    return {npu.maybe(&starts),
            {},
            {},
            {},
            npu.maybe(&lengths),
            entries(),
            residuals(),
            {},
            {},
            rows.size(1),
            kOnly,
            Mla::kWidth,
            lengths.size(0),
            rows.size(0),
            max_seq_len,
            held ? max_seq_len / per_entry : kNone,
            kNone,
            chosen(),
            per_entry,
            Mla::kWindow,
            Mla::kCausal,
            window - 1,
            kNone,
            {"TND"},
            {"PA_BBND"},
            true,
            held.has_value(),
            npu.out(metadata)};
  }

  Mla attention(const at::Tensor& metadata) const {
    return {npu.in(rows),
            npu.maybe(&near),
            npu.maybe(pointer(far)),
            {},
            npu.maybe(pointer(indices)),
            npu.maybe(&window_table),
            npu.maybe(pointer(cmp_table)),
            npu.maybe(&starts),
            {},
            {},
            {},
            npu.maybe(&lengths),
            entries(),
            residuals(),
            {},
            {},
            npu.in(sink),
            npu.in(metadata),
            1.0 / std::sqrt(static_cast<double>(Mla::kWidth)),
            per_entry,
            Mla::kWindow,
            Mla::kCausal,
            window - 1,
            kNone,
            {"TND"},
            {"PA_BBND"},
            Mla::kDefaultValues,
            false,
            npu.out(out),
            {}};
  }
};

struct SparseMla {
  static WhyNot why_not(const Context& context, const at::Tensor& q, const at::Tensor&,
                        const at::Tensor& window_cache, const at::Tensor&, Optional cmp_cache,
                        Optional, Optional cmp_indices, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t window, int64_t ratio) {
    const bool a5 = on_a5(context);
    return first(
        not_of("q", q, kHalves), not_keys(q, window_cache, cmp_cache, a5),
        unless(window == 128 || (a5 && window > 0), "the chip takes a window of 128 keys, A5 any"),
        not_kind(cmp_cache, cmp_indices, ratio, a5));
  }

  static at::Tensor run(const at::Tensor& q, const at::Tensor& sink, const at::Tensor& window_cache,
                        const at::Tensor& window_block_table, Optional cmp_cache,
                        Optional cmp_block_table, Optional cmp_indices,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, int64_t window, int64_t ratio) {
    const NpuCall npu("sparse_attention_p512", q);
    const Call call(npu, q, sink, window_cache, window_block_table, cmp_cache, cmp_block_table,
                    cmp_indices, query_start_loc, seq_lens, max_seq_len, window, ratio);
    const at::Tensor metadata = call.metadata<npu::SparseFlashMlaMetadata>();
    npu.launch(call.attention(metadata));
    return call.out;
  }
};

struct SparseMlaFp8 {
  using Mla = npu::MixedQuantSparseFlashMla;

  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor&,
                        const at::Tensor& window_cache, const at::Tensor&, Optional cmp_cache,
                        Optional, Optional cmp_indices, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t window, int64_t ratio, int64_t rope) {
    return first(not_keys(q, window_cache, cmp_cache, true),
                 unless(rope == Mla::kRope, "the chip takes 64 RoPE channels"),
                 unless(window == 128, "the chip takes a window of 128 keys"),
                 not_kind(cmp_cache, cmp_indices, ratio, false));
  }

  static at::Tensor run(const at::Tensor& q, const at::Tensor& sink, const at::Tensor& window_cache,
                        const at::Tensor& window_block_table, Optional cmp_cache,
                        Optional cmp_block_table, Optional cmp_indices,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, int64_t window, int64_t ratio, int64_t rope) {
    const NpuCall npu("sparse_attention_fp8", q);
    const Call call(npu, q, sink, window_cache, window_block_table, cmp_cache, cmp_block_table,
                    cmp_indices, query_start_loc, seq_lens, max_seq_len, window, ratio);
    const at::Tensor metadata = call.metadata<npu::MixedQuantSparseFlashMlaMetadata>(
        npu::Int(Mla::kBf16Scales), npu::Int(rope));
    npu.launch(Mla{{call.attention(metadata)}, Mla::kBf16Scales, rope});
    return call.out;
  }
};

const NpuRegistration<SparseMla, npu::SparseFlashMla, npu::SparseFlashMlaMetadata>
    sparse_attention_p512("sparse_attention_p512");
const NpuRegistration<SparseMlaFp8, npu::MixedQuantSparseFlashMla,
                      npu::MixedQuantSparseFlashMlaMetadata>
    sparse_attention_fp8("sparse_attention_fp8");

}  // namespace
}  // namespace dsv4::bind
