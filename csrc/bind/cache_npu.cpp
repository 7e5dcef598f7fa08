#include <ATen/ops/empty.h>

#include "npu/cache.h"
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

const NpuRegistration<WriteOne, npu::ScatterPaCache> write_cache_one("write_cache");
const NpuRegistration<Write, npu::ScatterPaKvCache> write_cache_both("write_cache");

}  // namespace
}  // namespace dsv4::bind
