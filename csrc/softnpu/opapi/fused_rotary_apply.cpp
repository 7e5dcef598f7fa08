// Rotary embedding of query and key in place, its gradient, and MLA's norm, rotation and cache
// update in one call. Tables: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include "fused_family.h"
#include "fused_norm.h"
#include "rotary.h"

namespace softnpu {
namespace {

// mirror-cann/ops-transformer posembedding/apply_rotary_pos_emb/docs/aclnnApplyRotaryPosEmb.md and
// ...V2.md; the page's bound by the vector unit's memory is not checked.
struct Apply {
  Out query, key;
  at::Tensor cos, sin;
  int64_t layout;
  std::string mode = "half";
  FIELDS(v1, query, key, cos, sin, layout)
  FIELDS(v2, query, key, cos, sin, layout, mode)

  void check() const {
    const auto type = query->defined() ? query->scalar_type() : kNone;
    const int64_t rank = layout == 4 ? 3 : 4;
    check_table({{"query", *query, true, kFloats, rank, rank, kDocument},
                 {"key", *key, true, {type}, rank, rank, kDocument},
                 {"cos", cos, true, {type}, rank, rank, kDocument},
                 {"sin", sin, true, {type}, rank, rank, kDocument}});
    require(layout == 1 || layout == 4 || (on_a5() && (layout == 2 || layout == 3)), "layout",
            text(layout), "1 (BSND) or 4 (TND); on Ascend 950 also 2 (SBND) or 3 (BNSD)");
    require(mode == "half" || (on_a5() && (mode == "interleave" || mode == "quarter")),
            "rotaryMode", mode, "half; on Ascend 950 also interleave or quarter");
    require(cos.sizes() == sin.sizes(), "sin", show(sin), "the shape of cos");
    require(key->size(-1) == query->size(-1), "key", show(*key), "the last dimension of query");
    const int64_t width = cos.size(-1);
    require(width == query->size(-1) || (on_a5() && width < query->size(-1)), "cos", show(cos),
            "the last dimension of query (on Ascend 950 at most that)");
  }

  void turn(const Out& x) const {
    const int64_t turning = mode == "half"         ? rotary::kHalf
                            : mode == "interleave" ? rotary::kInterleave
                                                   : rotary::kQuarter;
    x.touch();
    const at::Tensor part = x->narrow(-1, 0, cos.size(-1));
    part.copy_(rotated(part, cos.to(kF32), sin.to(kF32), turning));
  }

  void run() const { turn(query), turn(key); }
};

// mirror-cann/ops-transformer posembedding/rotary_position_embedding_grad/docs/
// aclnnRotaryPositionEmbeddingGrad.md
struct Gradient {
  at::Tensor dy, cos, sin, x;
  int64_t mode;
  Out dx, dcos, dsin;
  FIELDS(all, dy, cos, sin, x, mode, dx, dcos, dsin)

  void check() const {
    const auto type = dy.defined() ? dy.scalar_type() : kNone;
    check_table({{"dy", dy, true, kFloats, 3, 4, kDocument},
                 {"cos", cos, true, {type}, 3, 4, kDocument},
                 {"sin", sin, true, {type}, 3, 4, kDocument},
                 {"x", x, false, {type}, 3, 4, kDocument},
                 {"dx", *dx, true, {type}, 3, 4, kDocument},
                 {"dcos", *dcos, x.defined(), {type}, 3, 4, kDocument},
                 {"dsin", *dsin, x.defined(), {type}, 3, 4, kDocument}});
    require(
        mode >= rotary::kHalf && mode <= (on_a5() ? rotary::kInterleaveHalf : rotary::kInterleave),
        "mode", text(mode),
        "0 (half) or 1 (interleave); on Ascend 950 also 2 (quarter) or 3 (interleave-half)");
    require(cos.sizes() == sin.sizes(), "sin", show(sin), "the shape of cos");
    require(cos.dim() == dy.dim() && cos.size(-1) == dy.size(-1), "cos", show(cos),
            "rank and last dimension of dy");
    require(dy.size(-1) % 2 == 0, "dy", show(dy), "an even last dimension");
    require(!x.defined() || x.sizes() == dy.sizes(), "x", show(x), "the shape of dy");
  }

  void run() const {
    const RotaryGradients g = rotary_gradients(dy, cos, sin, x, mode);
    dx = g.x;
    if (x.defined()) dcos = g.cos, dsin = g.sin;
  }
};

// mirror-cann/ops-transformer posembedding/kv_rms_norm_rope_cache/docs/aclnnKvRmsNormRopeCache.md
// HIFLOAT8 caches are not emulated.
struct CacheUpdate {
  at::Tensor kv, gamma, cos, sin, index;
  Out k_cache, ckv_cache;
  at::Tensor k_scale, ckv_scale, k_offset, ckv_offset, value;
  double epsilon;
  std::string mode;
  bool output_kv;
  Out k_rope, c_kv;
  FIELDS(v1, kv, gamma, cos, sin, index, k_cache, ckv_cache, k_scale, ckv_scale, k_offset,
         ckv_offset, epsilon, mode, output_kv, k_rope, c_kv)
  FIELDS(v2, kv, gamma, cos, sin, index, k_cache, ckv_cache, k_scale, ckv_scale, k_offset,
         ckv_offset, value, epsilon, mode, output_kv, k_rope, c_kv)

  bool paged() const { return mode != "Norm"; }
  bool by_blocks() const { return mode.find("BLK") != std::string::npos; }
  bool tiled() const { return mode.ends_with("NZ"); }

  void check_cache(const char* name, const Out& cache, int64_t width, In scale,
                   const char* scale_name) const {
    const bool quantised = cache->scalar_type() != kv.scalar_type();
    require(cache->size(-1) == width, name, show(*cache),
            "a last dimension that is kv's part for this cache");
    require(quantised == scale.defined(), scale_name, scale.defined() ? show(scale) : "nothing",
            "a scale exactly for a quantised cache");
    require(cache->size(paged() ? 2 : 1) == 1, name, show(*cache), "one head");
    const int64_t block = 32 / cache->element_size();
    if (paged())
      require(cache->size(1) % block == 0, name, show(*cache), "blocks that are multiples of 32 B");
    require(!tiled() || width % block == 0, name, show(*cache), "rows that are multiples of 32 B");
  }

  // Keys and values apart: the whole key is normalised, its first part rotated (...V2.md; one head
  // only is emulated).
  void check_apart() const {
    require_generation(kOnA2A3);
    check_table({{"v", value, true, {kv.scalar_type()}, 4, 4, kDocument}});
    require(gamma.size(0) == kv.size(3) && cos.size(3) <= kv.size(3), "gamma", show(gamma),
            "the last dimension of kv");
    require(value.sizes().slice(0, 3) == kv.sizes().slice(0, 3), "v", show(value),
            "the shape of kv but for its last dimension");
  }

  void check() const {
    const auto type = kv.defined() ? kv.scalar_type() : kNone;
    const Types caches = also_on_a5({type, kI8}, {kE4M3, kE5M2});
    check_table({{"kv", kv, true, kHalves, 4, 4, kDocument},
                 {"gamma", gamma, true, {type}, 1, 1, kDocument},
                 {"cos", cos, true, {type}, 4, 4, kDocument},
                 {"sin", sin, true, {type}, 4, 4, kDocument},
                 {"index", index, true, {at::kLong}, 1, 2, kDocument},
                 {"kCacheRef", *k_cache, true, caches, 4, 4, kDocument},
                 {"ckvCacheRef", *ckv_cache, true, caches, 4, 4, kDocument},
                 {"kRopeScale", k_scale, false, {kF32}, 1, 2, kDocument},
                 {"ckvScale", ckv_scale, false, {kF32}, 1, 2, kDocument},
                 {"kRopeOffset", k_offset, false, {kF32}, 1, 2, kDocument},
                 {"cKvOffset", ckv_offset, false, {kF32}, 1, 2, kDocument},
                 {"kRopeOut", *k_rope, output_kv, {type}, 4, 4, kDocument},
                 {"cKvOut", *c_kv, output_kv, {type}, 4, 4, kDocument}});
    static const std::vector<std::string> modes = {"Norm",  "PA",          "PA_BNSD",
                                                   "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"};
    require(std::find(modes.begin(), modes.end(), mode) != modes.end(), "cacheMode", mode,
            "Norm, PA, PA_BNSD, PA_NZ, PA_BLK_BNSD or PA_BLK_NZ");
    require(kv.size(1) == 1, "kv", show(kv), "one head");
    if (value.defined())
      check_apart();
    else
      require(gamma.size(0) + cos.size(3) == kv.size(3), "kv", show(kv),
              "a last dimension of gamma's and cos' together");
    require(cos.sizes() == sin.sizes() && cos.size(0) == kv.size(0) && cos.size(1) == 1 &&
                (cos.size(2) == kv.size(2) || cos.size(2) == 1) && cos.size(3) % 2 == 0,
            "cos", show(cos), "[B, 1, S or 1, Dk]");
    const bool apart = value.defined();
    check_cache("kCacheRef", k_cache, apart ? kv.size(3) : cos.size(3), k_scale, "kRopeScale");
    check_cache("ckvCacheRef", ckv_cache, apart ? value.size(3) : gamma.size(0), ckv_scale,
                "ckvScale");
    const int64_t rows = kv.size(0), tokens = kv.size(2);
    const int64_t each = by_blocks() ? ceil_div(tokens, k_cache->size(1)) : tokens;
    const bool fits = paged() ? index.dim() == 1 && index.size(0) == rows * each
                              : index.dim() == 2 && index.size(0) == rows && index.size(1) == each;
    require(fits, "index", show(index),
            paged() ? "a value for each token, or each block of them" : "[B, S]");
  }

  // The slot of every token, -1 where it is not written.
  at::Tensor slots(const Out& cache) const {
    const int64_t rows = kv.size(0), tokens = kv.size(2);
    const int64_t height = cache->size(paged() ? 1 : 2);
    expect_values(index, -1, paged() ? cache->size(0) * height : height, "index");
    const at::Tensor given = index.reshape({rows, -1});
    const at::Tensor token = at::arange(tokens);
    if (by_blocks()) {
      const at::Tensor start = given.index_select(1, token.floor_divide(height));
      const at::Tensor slot = start.floor_divide(height).mul(height).add(token.remainder(height));
      return slot.masked_fill(start.lt(0), -1).reshape({-1});
    }
    if (paged()) return given.reshape({-1});
    return given.add(at::arange(rows).unsqueeze(1).mul(height))
        .masked_fill(given.lt(0), -1)
        .reshape({-1});
  }

  // Rows [tokens, width] of the cache's type; an NZ cache holds [blocks, width / c0, size, c0].
  void store(const Out& cache, In values, In scale, In offset) const {
    const int64_t width = values.size(-1);
    at::Tensor rows = values.reshape({-1, width});
    if (scale.defined()) {
      rows = rows.mul(scale.reshape({-1}));
      if (offset.defined()) rows = rows.add(offset.reshape({-1}));
      const Out bytes(at::empty(rows.sizes(), cache->options()));
      store_quantised(rows, bytes);
      rows = *bytes;
    } else {
      rows = rows.to(cache->scalar_type());
    }
    const at::Tensor slot = slots(cache), kept = slot.ge(0).nonzero().squeeze(1);
    const at::Tensor to = slot.index_select(0, kept), from = rows.index_select(0, kept);
    const auto raw = [](In x) { return x.element_size() == 1 ? x.view(at::kByte) : x; };
    cache.touch();
    if (!tiled()) {
      raw(*cache).view({-1, width}).index_copy_(0, to, raw(from));
      return;
    }
    const int64_t c0 = 32 / cache->element_size(), size = cache->size(1);
    raw(*cache)
        .view({-1, width / c0, size, c0})
        .index_put_({to.floor_divide(size), at::indexing::Slice(), to.remainder(size)},
                    raw(from).view({-1, width / c0, c0}));
  }

  at::Tensor normed() const {
    const at::Tensor x = kv.narrow(3, 0, gamma.size(0)).to(kF32);
    return normalised(x, inverse_rms(x, 1, epsilon), gamma, {});
  }

  void run_apart() const {
    const at::Tensor y = normed();
    const int64_t turned = cos.size(3);
    const at::Tensor front =
        rotated(y.narrow(3, 0, turned), cos.to(kF32), sin.to(kF32), rotary::kInterleaveHalf);
    const at::Tensor k = at::cat({front, y.slice(3, turned)}, 3), c = value.to(kF32);
    store(k_cache, k, k_scale, k_offset);
    store(ckv_cache, c, ckv_scale, ckv_offset);
    if (output_kv) k_rope = k, c_kv = c;
  }

  void run() const {
    if (value.defined()) return run_apart();
    const int64_t width = gamma.size(0);
    const at::Tensor c = normed();
    const at::Tensor k = rotated(kv.narrow(3, width, cos.size(3)), cos.to(kF32), sin.to(kF32),
                                 rotary::kInterleaveHalf);
    store(k_cache, k, k_scale, k_offset);
    store(ckv_cache, c, ckv_scale, ckv_offset);
    if (output_kv) k_rope = k, c_kv = c;
  }
};

}  // namespace

NAMED(aclnnApplyRotaryPosEmb, Apply, v1, check, run)
NAMED(aclnnApplyRotaryPosEmbV2, Apply, v2, check, run)
NAMED(aclnnRotaryPositionEmbeddingGrad, Gradient, all, check, run)
NAMED(aclnnKvRmsNormRopeCache, CacheUpdate, v1, check, run)
NAMED(aclnnKvRmsNormRopeCacheV2, CacheUpdate, v2, check, run)

}  // namespace softnpu
