#include <ATen/ops/empty.h>

#include <cmath>

#include "npu/attention.h"
#include "paged_npu.h"

namespace dsv4::bind {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr int64_t kOnly = 1;  // key head
constexpr int64_t kNone = 0;

const at::Tensor* pointer(const Optional& tensor) { return tensor ? &*tensor : nullptr; }

WhyNot not_heads(int64_t heads, bool a5) {
  const bool power = (heads & (heads - 1)) == 0;
  return unless(power && heads <= 128 && heads >= (a5 ? 2 : 1),
                "the chip takes a power of two of heads, up to 128, on A5 from 2");
}

// The ratio goes with the kind of keys.
WhyNot not_kind(const Optional& entries, const Optional& chosen, int64_t ratio, bool a5) {
  if (!entries) {
    return {};
  }
  if (!chosen) {
    return unless(ratio == 128, "the chip takes all entries with ratio 128 only");
  }
  const int64_t k = chosen->size(1);
  return first(unless(ratio == 4, "the chip takes chosen entries with ratio 4 only"),
               unless(k > 0 && (a5 || k == 512 || k == 1024),
                      "the chip takes 512 or 1024 chosen entries, A5 any number"));
}

struct SparseAttention {
  static WhyNot why_not(const Context& context, const at::Tensor& q, const at::Tensor&,
                        const at::Tensor& window_cache, const at::Tensor&, Optional cmp_cache,
                        Optional, Optional cmp_indices, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t window, int64_t ratio) {
    const bool a5 = on_a5(context);
    return first(
        not_of("q", q, kHalves), empty("q", q),
        unless(q.size(2) == npu::SparseFlashMla::kWidth, "the chip takes heads of 512 channels"),
        not_heads(q.size(1), a5),
        unless(window == 128 || (a5 && window > 0), "the chip takes a window of 128 keys, A5 any"),
        not_pages("window_cache", window_cache, a5),
        cmp_cache ? not_pages("cmp_cache", *cmp_cache, a5) : WhyNot(),
        not_kind(cmp_cache, cmp_indices, ratio, a5));
  }

  static at::Tensor run(const at::Tensor& q, const at::Tensor& sink, const at::Tensor& window_cache,
                        const at::Tensor& window_block_table, Optional cmp_cache,
                        Optional cmp_block_table, Optional cmp_indices,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, int64_t window, int64_t ratio) {
    using Mla = npu::SparseFlashMla;
    const bool has_cmp = cmp_cache.has_value();
    const int64_t per_entry = has_cmp ? ratio : 1, left = window - 1;
    const int64_t heads = q.size(1), chosen = cmp_indices ? cmp_indices->size(1) : kNone;
    const at::Tensor rows = q.contiguous(), near = one_head(window_cache);
    const auto held = has_cmp ? std::optional<EntryLengths>({seq_lens, ratio}) : std::nullopt;
    const Optional far = has_cmp ? Optional(one_head(*cmp_cache)) : Optional();
    const Optional indices = chosen ? Optional(cmp_indices->unsqueeze(1).contiguous()) : Optional();
    const at::Tensor* lengths = held ? &held->entries : nullptr;
    const at::Tensor* residuals = held ? &held->residuals : nullptr;
    const at::Tensor metadata = at::empty({npu::kMetadata}, seq_lens.options());
    at::Tensor out = at::empty(rows.sizes(), rows.options());
    const NpuCall call("sparse_attention_p512", q);
    call.launch(npu::SparseFlashMlaMetadata{call.maybe(&query_start_loc),
                                            {},
                                            {},
                                            {},
                                            call.maybe(&seq_lens),
                                            call.maybe(lengths),
                                            call.maybe(residuals),
                                            {},
                                            {},
                                            heads,
                                            kOnly,
                                            Mla::kWidth,
                                            seq_lens.size(0),
                                            q.size(0),
                                            max_seq_len,
                                            has_cmp ? max_seq_len / ratio : kNone,
                                            kNone,
                                            chosen,
                                            per_entry,
                                            Mla::kWindow,
                                            Mla::kCausal,
                                            left,
                                            kNone,
                                            {"TND"},
                                            {"PA_BBND"},
                                            true,
                                            has_cmp,
                                            call.out(metadata)});
    call.launch(Mla{call.in(rows),
                    call.maybe(&near),
                    call.maybe(pointer(far)),
                    {},
                    call.maybe(pointer(indices)),
                    call.maybe(&window_block_table),
                    call.maybe(pointer(cmp_block_table)),
                    call.maybe(&query_start_loc),
                    {},
                    {},
                    {},
                    call.maybe(&seq_lens),
                    call.maybe(lengths),
                    call.maybe(residuals),
                    {},
                    {},
                    call.in(sink),
                    call.in(metadata),
                    1.0 / std::sqrt(static_cast<double>(Mla::kWidth)),
                    per_entry,
                    Mla::kWindow,
                    Mla::kCausal,
                    left,
                    kNone,
                    {"TND"},
                    {"PA_BBND"},
                    Mla::kDefaultValues,
                    false,
                    call.out(out),
                    {}});
    return out;
  }
};

const NpuRegistration<SparseAttention, npu::SparseFlashMla, npu::SparseFlashMlaMetadata>
    sparse_attention("sparse_attention_p512");

}  // namespace
}  // namespace dsv4::bind
