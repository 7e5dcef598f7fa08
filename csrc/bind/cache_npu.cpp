#include <ATen/ops/empty.h>

#include "npu/cache.h"
#include "npu/quant.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

// [.., D] with an axis of one head before its last.
at::Tensor one_head(const at::Tensor& x) { return x.unsqueeze(-2); }

struct Write {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(not_of("cache", cache, kHalves), empty("rows", rows),
                 unless(cache.is_contiguous(), "cache has gaps, and the chip takes none"));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
    const at::Tensor pages = one_head(cache), key = one_head(rows);
    const at::Tensor no_value = at::empty({}, rows.options());
    const NpuCall call("write_cache", cache);
    call.launch(npu::ScatterPaKvCache{
        call.in(key),
        call.out(pages),
        call.in(slots),
        call.maybe(&no_value),
        {call.out(no_value).view},
        {},
        {},
        {},
        {"Norm"},
        {"None"},
        {},
        {},
    });
  }
};

struct WriteOne {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(not_of("cache", cache, kFloats), empty("rows", rows),
                 unless(cache.is_contiguous(), "cache has gaps, and the chip takes none"));
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

  static WhyNot why_not(const Context& context, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&, int64_t block_size) {
    const int64_t page = block_size * (rows.size(1) + kScaleBytes);
    return first(unless(!on_a5(context), "ScatterPaKvCache takes no pages with gaps on A5"),
                 not_of("rows", rows, kHalves), empty("rows", rows),
                 unless(cache.size(1) == page && cache.is_contiguous(),
                        "cache has gaps, and the chip takes none"));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                  int64_t block_size) {
    const int64_t count = rows.size(0), width = rows.size(1), codes_of_page = block_size * width;
    const at::Tensor bytes = cache.view(at::kChar);
    const auto section = [&](int64_t first, int64_t size) {
      return bytes.narrow(1, first, block_size * size).unflatten(1, {block_size, 1, size});
    };
    const at::Tensor codes_cache = section(0, width);
    const at::Tensor scale_cache = section(codes_of_page, kScaleBytes);
    const at::Tensor codes = at::empty({count, 1, width}, bytes.options());
    const at::Tensor scale = at::empty({count, 1}, bytes.options().dtype(at::kFloat));
    const at::Tensor values = rows.contiguous().unsqueeze(1);
    const NpuCall call("write_cache_indexer_int8", cache);
    call.launch(npu::DynamicQuant{
        call.in(values), {}, {}, {acl_type(at::kChar)}, call.out(codes), call.out(scale), {}});
    const at::Tensor half = scale.clamp_max(kLargestHalf).to(at::kHalf);
    const at::Tensor scale_bytes = half.view(at::kChar).unsqueeze(1);
    call.launch(npu::ScatterPaKvCache{call.in(codes),
                                      call.out(codes_cache),
                                      call.in(slots),
                                      call.maybe(&scale_bytes),
                                      {call.out(scale_cache).view},
                                      {},
                                      {},
                                      {},
                                      {"Norm"},
                                      {"None"},
                                      {},
                                      {}});
  }

 private:
  static constexpr double kLargestHalf = 65504;
};

const NpuRegistration<WriteOne, npu::ScatterPaCache> write_cache_one("write_cache");
const NpuRegistration<Write, npu::ScatterPaKvCache> write_cache_both("write_cache");
const NpuRegistration<WriteInt8, npu::ScatterPaKvCache, npu::DynamicQuant> write_int8(
    "write_cache_indexer_int8");

}  // namespace
}  // namespace dsv4::bind
