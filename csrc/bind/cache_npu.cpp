#include <ATen/ops/empty.h>

#include "npu/cache.h"
#include "paged_npu.h"
#include "quant_npu.h"

namespace dsv4::bind {
namespace {

WhyNot not_cache(const at::Tensor& cache, const at::Tensor& rows) {
  return first(empty("rows", rows),
               unless(cache.is_contiguous(), "cache has gaps, and the chip takes none"));
}

// Rows [M, 1, D] of one or two caches [pages, rows, 1, D] to the same slots.
void scatter(const NpuCall& call, const at::Tensor& slots, const at::Tensor& key,
             const at::Tensor& key_cache, const at::Tensor& value, const at::Tensor& value_cache) {
  call.launch(npu::ScatterPaKvCache{call.in(key),
                                    call.out(key_cache),
                                    call.in(slots),
                                    call.maybe(&value),
                                    {call.out(value_cache).view},
                                    {},
                                    {},
                                    {},
                                    {"Norm"},
                                    {"None"},
                                    {},
                                    {}});
}

struct Write {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(not_of("cache", cache, kHalves), not_cache(cache, rows));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
    const at::Tensor nothing = at::empty({}, rows.options());
    scatter(NpuCall("write_cache", cache), slots, one_head(rows), one_head(cache), nothing,
            nothing);
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
  static constexpr int64_t kScaleBytes = 2;
  static constexpr double kLargestHalf = 65504;

  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&, int64_t block_size) {
    return first(not_of("rows", rows, kHalves), not_cache(cache, rows),
                 unless(cache.size(1) == block_size * (rows.size(1) + kScaleBytes),
                        "cache has gaps, and the chip takes none"));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                  int64_t block_size) {
    const at::Tensor bytes = cache.view(at::kChar);
    const auto section = [&](int64_t first, int64_t size) {
      return bytes.narrow(1, first, block_size * size).unflatten(1, {block_size, 1, size});
    };
    const NpuCall call("write_cache_indexer_int8", cache);
    const auto [codes, scale] = token_quantised(call, one_head(rows.contiguous()), at::kChar);
    const at::Tensor half = scale.clamp_max(kLargestHalf).to(at::kHalf);
    scatter(call, slots, codes, section(0, rows.size(1)), one_head(half.view(at::kChar)),
            section(block_size * rows.size(1), kScaleBytes));
  }
};

const NpuRegistration<WriteOne, npu::ScatterPaCache> write_cache_one("write_cache");
const NpuRegistration<Write, npu::ScatterPaKvCache> write_cache_both("write_cache");
const NpuRegistration<WriteInt8, npu::ScatterPaKvCache, npu::DynamicQuant> write_int8(
    "write_cache_indexer_int8");

}  // namespace
}  // namespace dsv4::bind
