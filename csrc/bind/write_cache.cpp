#include "candidate.h"
#include "cpu/write_rows.h"

namespace dsv4::bind {
namespace {

WhyNot not_adjacent(const char* name, const at::Tensor& tensor) {
  if (tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    return std::string(name) + "'s last dimension is not contiguous";
  }
  return std::nullopt;
}

// Bytes are copied: one kernel for every dtype and every instruction set.
struct WriteCacheKernel {
  static WhyNot why_not(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                        const at::Tensor&) {
    const WhyNot reason = not_adjacent("cache", cache);
    return reason ? reason : not_adjacent("rows", rows);
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
    const WhyNot reason = WriteCacheKernel::why_not(context, cache, rows, slots);
    if (reason) {
      return reason;
    }
    const WhyNot gap = not_adjacent("other", other);
    return gap ? gap : not_adjacent("other_rows", other_rows);
  }

  static void run(const at::Tensor& cache, const at::Tensor& other, const at::Tensor& rows,
                  const at::Tensor& other_rows, const at::Tensor& slots) {
    WriteCacheKernel::run(cache, rows, slots);
    WriteCacheKernel::run(other, other_rows, slots);
  }
};

struct Registration {
  Registration() {
    add_candidate("write_caches", c10::DeviceType::CPU, "write_caches/portable",
                  &TypedPredicate<&WriteCachesKernel::why_not>::why_not,
                  &TypedFunction<&WriteCachesKernel::run>::run);
    add_candidate("write_cache", c10::DeviceType::CPU, "write_cache/portable",
                  &TypedPredicate<&WriteCacheKernel::why_not>::why_not,
                  &TypedFunction<&WriteCacheKernel::run>::run);
  }
};

const Registration registration;

}  // namespace
}  // namespace dsv4::bind
