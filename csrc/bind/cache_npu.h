// Writes to paged caches as a step of launchers.
#pragma once

#include "npu/cache.h"
#include "paged_npu.h"

namespace dsv4::bind {

// Rows [M, 1, D] of one or two caches [pages, rows, 1, D] to the same slots.
inline void scatter(const NpuCall& call, const at::Tensor& slots, const at::Tensor& key,
                    const at::Tensor& key_cache, const at::Tensor& value,
                    const at::Tensor& value_cache) {
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

// Pages of int8 rows behind each other, then their fp16 scales: uint8 [pages, bytes].
struct Int8Pages {
  static constexpr int64_t kScaleBytes = 2;
  static constexpr double kLargestScale = 65504;

  at::Tensor bytes;
  int64_t rows, channels;

  static WhyNot why_not(const at::Tensor& cache, int64_t rows, int64_t channels) {
    return unless(cache.is_contiguous() && cache.size(1) == rows * (channels + kScaleBytes),
                  "cache has gaps, and the chip takes none");
  }

  Int8Pages(const at::Tensor& cache, int64_t rows, int64_t channels)
      : bytes(cache.view(at::kChar)), rows(rows), channels(channels) {}

  // codes [M, channels] and fp16 scales [M, 1] to slots [M].
  void write(const NpuCall& call, const at::Tensor& codes, const at::Tensor& scales,
             const at::Tensor& slots) const {
    scatter(call, slots, one_head(codes), section(0, channels), one_head(scales.view(at::kChar)),
            section(rows * channels, kScaleBytes));
  }

 private:
  at::Tensor section(int64_t first, int64_t size) const {
    return bytes.narrow(1, first, rows * size).unflatten(1, {rows, 1, size});
  }
};

constexpr float kUnscaled = 1;  // x_scale of writers that quantise

// Pages of e4m3 rows behind each other, then their fp32 scales: uint8 [pages, bytes].
struct Fp8Pages {
  static constexpr int64_t kScaleBytes = 4, kChannels = 128;

  const at::Tensor& cache;
  int64_t rows, channels;

  static WhyNot why_not(const at::Tensor& cache, int64_t channels) {
    return first(
        unless(channels == kChannels, "the chip takes rows of 128 channels"),
        unless(whole_pages(cache), "cache has gaps inside its pages"),
        unless(cache.storage_offset() % kScaleBytes == 0 && cache.stride(0) % kScaleBytes == 0,
               "pages do not begin where an fp32 scale can"));
  }

  Fp8Pages(const at::Tensor& cache, int64_t rows, int64_t channels)
      : cache(cache), rows(rows), channels(channels) {}

  // x [M, channels], which the chip quantises, to slots [M].
  void write(const NpuCall& call, const at::Tensor& x, const at::Tensor& slots) const {
    const at::Tensor codes = section(0, channels, at::kFloat8_e4m3fn);
    const at::Tensor scales = section(rows * channels, kScaleBytes, at::kFloat);
    const auto narrow = [&] { return Tensors{slots.to(at::kInt).contiguous()}; };
    const at::Tensor places = Step::once({"slots in int32", {slots}, {}}, narrow).at(0);
    call.launch(npu::IndexerQuantCache{call.out(codes), call.out(scales), call.in(x),
                                       call.in(places), npu::IndexerQuantCache::kRowScales, false,
                                       kUnscaled});
  }

 private:
  at::Tensor section(int64_t first, int64_t size, at::ScalarType type) const {
    const at::Tensor bytes = cache.narrow(1, first, rows * size);
    return one_head(bytes.view(type).unflatten(1, {rows, -1}));
  }
};

}  // namespace dsv4::bind
