#include "candidate.h"
#include "cpu/write_rows.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

// Bytes are copied: one kernel for every dtype and every instruction set.
struct WriteCacheKernel {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    return first(not_adjacent_elements("cache", cache), not_adjacent_elements("rows", rows));
  }

  static void run(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
    const auto bytes = static_cast<int64_t>(cache.element_size());
    cpu::write_rows({static_cast<char*>(cache.mutable_data_ptr()), cache.size(0), cache.size(1),
                     cache.stride(0) * bytes, cache.stride(1) * bytes,
                     static_cast<const char*>(rows.const_data_ptr()), rows.stride(0) * bytes,
                     rows.size(1) * bytes, slots.const_data_ptr<int64_t>(), slots.stride(0),
                     slots.size(0)});
  }
};

struct WriteCachesKernel {
  static WhyNot why_not(const Context& context, const at::Tensor& cache, const at::Tensor& other,
                        const at::Tensor& rows, const at::Tensor& other_rows,
                        const at::Tensor& slots) {
    return first(WriteCacheKernel::why_not(context, cache, rows, slots),
                 WriteCacheKernel::why_not(context, other, other_rows, slots));
  }

  static void run(const at::Tensor& cache, const at::Tensor& other, const at::Tensor& rows,
                  const at::Tensor& other_rows, const at::Tensor& slots) {
    WriteCacheKernel::run(cache, rows, slots);
    WriteCacheKernel::run(other, other_rows, slots);
  }
};

const PortableRegistration<&WriteCacheKernel::why_not, &WriteCacheKernel::run> write_cache(
    "write_cache");
const PortableRegistration<&WriteCachesKernel::why_not, &WriteCachesKernel::run> write_caches(
    "write_caches");

}  // namespace
}  // namespace dsv4::bind
