#include "cache_npu.h"

#include <ATen/ops/empty.h>

#include "quant_npu.h"

namespace dsv4::bind {
namespace {

WhyNot not_cache(const at::Tensor& cache, const at::Tensor& rows) {
  return first(empty("rows", rows),
               unless(cache.is_contiguous(), "cache has gaps, and the chip takes none"));
}

struct Write {
  static WhyNot why_not(const Context& context, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(unless(!on_a5(context), "A5 takes two caches"), not_of("cache", cache, kHalves),
                 not_cache(cache, rows));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
    const at::Tensor nothing = at::empty({}, rows.options());
    scatter(NpuCall("write_cache", cache), slots, one_head(rows), one_head(cache), nothing,
            nothing);
  }
};

struct WriteTwo {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& other,
                        const at::Tensor& rows, const at::Tensor& other_rows, const at::Tensor&) {
    return first(not_of("cache", cache, kHalves), not_cache(cache, rows),
                 not_cache(other, other_rows));
  }

  static void run(const at::Tensor& cache, const at::Tensor& other, const at::Tensor& rows,
                  const at::Tensor& other_rows, const at::Tensor& slots) {
    scatter(NpuCall("write_caches", cache), slots, one_head(rows), one_head(cache),
            one_head(other_rows), one_head(other));
  }
};

struct WriteOne {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(not_of("cache", cache, kFloats), not_cache(cache, rows));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
    const at::Tensor pages = one_head(cache), key = one_head(rows.contiguous());
    const NpuCall call("write_cache", cache);
    call.launch(
        npu::ScatterPaCache{call.in(key), call.out(pages), call.in(slots), {}, {}, {}, {"Norm"}});
  }
};

// Rows in int8 behind each other on a page, then their fp16 scales.
struct WriteInt8 {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&, int64_t block_size) {
    return first(not_of("rows", rows, kHalves), empty("rows", rows),
                 Int8Pages::why_not(cache, block_size, rows.size(1)));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                  int64_t block_size) {
    const NpuCall call("write_cache_indexer_int8", cache);
    const auto [codes, scale] = token_quantised(call, rows.contiguous(), at::kChar);
    const at::Tensor half = scale.clamp_max(Int8Pages::kLargestScale).to(at::kHalf);
    Int8Pages(cache, block_size, rows.size(1)).write(call, codes, half.unsqueeze(-1), slots);
  }
};

// Rows of bytes, one behind the other on a page.
struct WriteLatents {
  using Epilog = npu::KvCompressEpilog;

  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&, int64_t, int64_t rope) {
    return first(not_of("rows", rows, {at::kBFloat16}), empty("rows", rows),
                 unless(rope == Epilog::kRope, "the chip takes 64 RoPE channels"),
                 unless(rows.size(1) % Epilog::kGroup == 0 && rows.size(1) <= Epilog::kLargestRow,
                        "the chip takes a multiple of 64 channels, up to 8192"),
                 unless(whole_pages(cache), "cache has gaps inside its pages"));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                  int64_t block_size, int64_t) {
    const at::Tensor pages = one_head(cache.unflatten(1, {block_size, -1}));
    const at::Tensor x = rows.contiguous(), places = slots.contiguous();
    const NpuCall call("write_cache_kv_epilog", cache);
    call.launch(Epilog{call.out(pages), call.in(x), call.in(places), Epilog::kGroup,
                       Epilog::kBf16Scales, true, kUnscaled});
  }
};

struct WriteTokenFp8 {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&, int64_t) {
    return first(not_of("rows", rows, kHalves), empty("rows", rows),
                 Fp8Pages::why_not(cache, rows.size(1)));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                  int64_t block_size) {
    const NpuCall call("write_cache_indexer_token_fp8", cache);
    Fp8Pages(cache, block_size, rows.size(1)).write(call, rows.contiguous(), slots);
  }
};

const NpuRegistration<WriteOne, npu::ScatterPaCache> write_cache_one("write_cache");
const NpuRegistration<Write, npu::ScatterPaKvCache> write_cache_both("write_cache");
const NpuRegistration<WriteTwo, npu::ScatterPaKvCache> write_caches("write_caches");
const NpuRegistration<WriteInt8, npu::ScatterPaKvCache, npu::DynamicQuant> write_int8(
    "write_cache_indexer_int8");
const NpuRegistration<WriteLatents, npu::KvCompressEpilog> write_latents("write_cache_kv_epilog");
const NpuRegistration<WriteTokenFp8, npu::IndexerQuantCache> write_token_fp8(
    "write_cache_indexer_token_fp8");

}  // namespace
}  // namespace dsv4::bind
