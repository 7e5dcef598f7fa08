// Writers of quantised caches on A5. Tables: argument, its tensor, required, dtypes, ranks, source;
// docs/spec/ascend-operators.md 4.16, 7, 12.
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "fused_paged.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

constexpr double kFp8Largest = 448, kFloor = 1e-4, kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kRope = 64;  // rotated channels at the end of a row, kept in bf16

// amax / 448 as the kernels have it, rounded up to a power of two where asked.
at::Tensor scales_of(In amax, bool power_of_two) {
  const at::Tensor scale = amax.mul(static_cast<double>(static_cast<float>(1 / kFp8Largest)));
  if (!power_of_two) return scale;
  return at::exp2(at::log2(scale.to(at::kDouble)).ceil()).to(kF32);
}

at::Tensor e4m3_bytes(In values) { return saturated(values, kE4M3).view(at::kByte); }

struct KvCompressEpilog {
  Out kv_compress_cache;
  at::Tensor x, slot_mapping;
  int64_t quant_group_size, quant_mode;
  bool round_scale;
  float x_scale;
  FIELDS(all, kv_compress_cache, x, slot_mapping, quant_group_size, quant_mode, round_scale,
         x_scale)

  int64_t nope() const { return x.size(1) - kRope; }
  int64_t used() const {  // rotated values, e4m3 values, a bf16 scale for each group
    return 2 * kRope + nope() + 2 * (nope() / quant_group_size);
  }

  int64_t row() const { return ceil_div(used(), 32) * 32; }

  // Rows are filled up to 32 bytes (608 for V4, as the reader wants them) with zeros; bytes of the
  // cache behind them stay (page and kernel).
  void check() const {
    require_family(kOnA5);
    check_table({{"kv_compress_cache", *kv_compress_cache, true, {at::kByte}, 4, 4, kDocument},
                 {"x", x, true, {kBF16}, 2, 2, kDocument},
                 {"slot_mapping", slot_mapping, true, {kI32, at::kLong}, 1, 1, kDocument}});
    require(quant_group_size == 64, "quant_group_size", text(quant_group_size), "64");
    require(quant_mode == 0, "quant_mode", text(quant_mode), "0 (1 and 2 are not emulated)");
    require(round_scale, "round_scale", "false", "true (false is not emulated)");
    require(x_scale == 1, "x_scale", shown(x_scale), "1 (others are not emulated)");
    require(x.size(1) % 64 == 0 && nope() > 0, "x", show(x), "[rows, d], d a multiple of 64");
    require(slot_mapping.size(0) == x.size(0), "slot_mapping", show(slot_mapping),
            "a slot for each row");
    const auto& cache = *kv_compress_cache;
    require(cache.size(2) == 1 && cache.size(3) >= row(), "kv_compress_cache", show(cache),
            "[pages, rows, 1, bytes], a multiple of 32 bytes or more (608 for d = 512)");
    paged::check_pages(cache, "kv_compress_cache");
    paged::check_dense(x, "x");
  }

  // Our reading: a group with NaN or infinity is NaN altogether.
  void run() const {
    const at::Tensor groups =
        x.narrow(1, 0, nope()).to(kF32).unflatten(1, {nope() / quant_group_size, quant_group_size});
    const at::Tensor amax = at::amax(groups.abs(), {-1}, true);
    const at::Tensor scale =
        at::where(at::isfinite(amax), scales_of(amax.clamp_min(kFloor), true), kNan);
    const at::Tensor held =  // one NaN, whatever the cast makes of it
        scale.squeeze(-1).to(kBF16).masked_fill(at::isnan(scale.squeeze(-1)), kNan).contiguous();
    const at::Tensor rows = at::cat({x.narrow(1, nope(), kRope).contiguous().view(at::kByte),
                                     e4m3_bytes(groups.div(scale)).flatten(1), held.view(at::kByte),
                                     at::zeros({x.size(0), row() - used()}, at::kByte)},
                                    1);
    const auto& cache = *kv_compress_cache;
    const int64_t size = cache.size(1);
    const auto slots = paged::slots_of(slot_mapping, cache.size(0) * size, "slot_mapping");
    kv_compress_cache.touch();
    for (size_t i = 0; i < slots.size(); ++i)
      if (slots[i] >= 0)
        cache[slots[i] / size][slots[i] % size][0]
            .narrow(0, 0, row())
            .copy_(rows[static_cast<int64_t>(i)]);
  }
};

// Mode 1 as the kernel has it: no floor, values that are not finite do not count for the scale,
// the others are multiplied with its reciprocal, or stay as they are where that is not finite.
struct IndexerQuantCache {
  Out cache, cache_scale;
  at::Tensor x, slot_mapping;
  int64_t quant_mode;
  bool round_scale;
  float x_scale;
  FIELDS(all, cache, cache_scale, x, slot_mapping, quant_mode, round_scale, x_scale)

  void check() const {
    require_family(kOnA5);
    check_table({{"cache", *cache, true, {kE4M3}, 4, 4, kDocument},
                 {"cache_scale", *cache_scale, true, {kF32}, 4, 4, kDocument},
                 {"x", x, true, kHalves, 2, 2, kReading},
                 {"slot_mapping", slot_mapping, true, {kI32}, 1, 1, kDocument}});
    require(quant_mode == 1, "quant_mode", text(quant_mode), "1 (0, 2 and 3 are not emulated)");
    require(x_scale == 1, "x_scale", shown(x_scale), "1 (others are not emulated)");
    require(x.size(1) == 128, "x", show(x), "[rows, 128]");
    require(slot_mapping.size(0) == x.size(0), "slot_mapping", show(slot_mapping),
            "a slot for each row");
    require(cache->size(2) == 1 && cache->size(3) >= 128, "cache", show(*cache),
            "[pages, rows, 1, 128 or more]");
    require(cache_scale->size(0) == cache->size(0) && cache_scale->size(1) == cache->size(1) &&
                cache_scale->size(2) == 1 && cache_scale->size(3) == 1,
            "cache_scale", show(*cache_scale), "[pages, rows, 1, 1] of cache");
    paged::check_pages(*cache, "cache");
    paged::check_pages(*cache_scale, "cache_scale");
    paged::check_dense(x, "x");
  }

  void run() const {
    const at::Tensor wide = x.to(kF32), finite = at::isfinite(wide);
    const at::Tensor amax = at::amax(at::where(finite, wide.abs(), 0.0), {-1}, true);
    const at::Tensor scale = scales_of(amax, round_scale), scaled = wide.mul(scale.reciprocal());
    const at::Tensor values = at::where(at::isfinite(scaled), scaled, wide);
    const at::Tensor rows = e4m3_bytes(at::where(finite, values, kNan));
    const at::Tensor bytes = cache->view(at::kByte);
    const int64_t size = cache->size(1);
    const auto slots = paged::slots_of(slot_mapping, cache->size(0) * size, "slot_mapping");
    cache.touch();
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i] < 0) continue;
      const int64_t page = slots[i] / size, row = slots[i] % size, from = static_cast<int64_t>(i);
      bytes[page][row][0].narrow(0, 0, 128).copy_(rows[from]);
      (*cache_scale)[page][row][0].copy_(scale[from]);
    }
  }
};

}  // namespace

NAMED(aclnnKvCompressEpilog, KvCompressEpilog, all, check, run)
NAMED(aclnnIndexerQuantCache, IndexerQuantCache, all, check, run)

}  // namespace softnpu
