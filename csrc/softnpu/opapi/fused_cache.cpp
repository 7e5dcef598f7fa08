// Paged key/value caches. Tables: argument, its tensor, required, dtypes, ranks, source; their
// documents are in cann/ops-transformer.
#include "check.h"

namespace softnpu {
namespace {

// A cache, also as NZ of one tile's width and whole tiles' height: those tiles lie as PA_NZ has
// them.
struct Cache : Out {
  bool tiled = false;
  Cache() = default;
  Cache(Out out, bool tiled) : Out(std::move(out)), tiled(tiled) {}
};

}  // namespace

template <>
struct Argument<Cache> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "aclTensor*";
  static Cache take(Builder& b, Raw raw) {
    const int64_t width = raw ? tile_width(*raw) : 0;
    const size_t rank = width ? raw->sizes.size() : 0;
    if (rank < 2 || raw->sizes[rank - 1] != width || raw->sizes[rank - 2] % 16)
      return {b.out(raw), false};
    aclTensor rows = *raw;
    rows.format = 2, rows.storage = rows.sizes;
    return {b.out(&rows), true};
  }
};

namespace {

const Types kIndices = {at::kInt, at::kLong};

Types moved_dtypes(bool four_bits) {
  Types dtypes = {kF16, kBF16, at::kChar};
  if (on_a5())
    dtypes.insert(dtypes.end(), {kF32, at::kByte, at::kShort, at::kUInt16, at::kInt, at::kUInt32,
                                 at::kFloat8_e5m2, at::kFloat8_e4m3fn});
  if (on_a5() && four_bits) dtypes.push_back(at::kFloat4_e2m1fn_x2);
  return dtypes;
}

at::Tensor plain(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat4_e2m1fn_x2 ? x.view(at::kByte)
                                                  : x;  // ATen does not index 4-bit values
}

struct Slots {
  std::vector<int64_t> values;
  int64_t limit;
  Slots(In mapping, int64_t slots) : limit(slots) {
    const at::Tensor flat = mapping.reshape({-1}).to(at::kLong).contiguous();
    values.assign(flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel());
  }
  // -1 means "store nothing", as torch_npu's own test has it; the document only says 0 to slots -
  // 1: kReading.
  bool skips(size_t i, int64_t count) const {
    const int64_t slot = values[i];
    if (slot > limit - count)
      throw Fault(kKernelFault,
                  "argument 'slot_mapping': slot " + text(slot) +
                      (count == 1 ? "" : " and the " + text(count) + " values from there") +
                      " beyond " + text(limit) + " slots");
    return slot < 0;
  }
};

void store_tokens(In x, Out cache, In mapping, bool tiles) {
  const at::Tensor from = plain(x), to = plain(*cache);
  const int64_t block = tiles ? to.size(-2) : to.size(1);
  const Slots slots(mapping, to.size(0) * block);
  cache.touch();
  for (size_t i = 0; i < slots.values.size(); ++i) {
    if (slots.skips(i, 1)) continue;
    const int64_t slot = slots.values[i];
    const at::Tensor place =
        tiles ? to.select(0, slot / block).select(-2, slot % block)  // [N * D / last, last]
              : to.select(0, slot / block).select(0, slot % block);
    place.copy_(from.select(0, static_cast<int64_t>(i)).reshape(place.sizes()));
  }
}

// Scene "compressed": of each sequence and head the values up to `offset`, the mean of the next
// `length`, the rest; without offsets the last `length` values only.
void store_compressed(In x, Out cache, In mapping, In lengths, In offsets, In sequences) {
  const int64_t heads = x.size(2);
  const int64_t block = cache->size(1);
  const Slots slots(mapping, cache->size(0) * block), length(lengths, INT64_MAX),
      sequence(sequences, INT64_MAX);
  const Slots offset(offsets.defined() ? offsets : lengths, INT64_MAX);
  cache.touch();
  for (size_t i = 0; i < slots.values.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    const at::Tensor values = x.select(0, row / heads).select(1, row % heads);  // [seq_len, D]
    const int64_t end = sequence.values[i / static_cast<size_t>(heads)], window = length.values[i];
    const int64_t start = offsets.defined() ? offset.values[i] : end - window;
    if (start < 0 || window < 0 || end > values.size(0) || window > end - start)
      throw Fault(kKernelFault, "argument 'compress_lens': " + text(window) + " values from " +
                                    text(start) + " of a sequence of " + text(end) + " in " +
                                    text(values.size(0)));
    // The window takes one slot even when it is empty (its mean is then NaN): kReading.
    if (slots.skips(i, offsets.defined() ? end - window + 1 : window)) continue;
    int64_t at = slots.values[i];
    const auto put = [&](const at::Tensor& part) {
      for (int64_t t = 0; t < part.size(0); ++t, ++at)
        (*cache)[at / block][at % block][0].copy_(part[t]);
    };
    if (!offsets.defined()) {
      put(values.slice(0, start, end));
      continue;
    }
    put(values.slice(0, 0, start));
    put(values.slice(0, start, start + window).to(kF32).mean(0, true));
    put(values.slice(0, start + window, end));
  }
}

using Named = std::initializer_list<std::pair<const char*, const at::Tensor&>>;

void check_index_dtypes(In mapping, Named others) {
  for (const auto& [argument, x] : others)
    if (x.defined())
      require(x.scalar_type() == mapping.scalar_type(), argument, show(x),
              "the dtype of the other indices");
}

void check_not_compressed(Named arguments) {
  for (const auto& [argument, x] : arguments)
    require(!x.defined(), argument, show(x), "nothing with a key of three dimensions");
}

// The compressed scene's shapes: x [batch, seq_len, heads, D], cache [blocks, block_size, 1, D].
void check_compressed(In x, const at::Tensor& cache, In mapping, In lengths, In offsets,
                      In sequences, const char* argument) {
  const int64_t rows = x.size(0) * x.size(2);
  require(cache.dim() == 4 && cache.size(2) == 1 && cache.size(3) == x.size(3), argument,
          show(cache), "[num_blocks, block_size, 1, head_size]");
  require(mapping.dim() == 2 && mapping.size(0) == x.size(0) && mapping.size(1) == x.size(2),
          "slot_mapping", show(mapping), "[batch, num_head]");
  require(lengths.defined() && lengths.numel() == rows, "compress_lens", show(lengths),
          "[batch, num_head]");
  require(sequences.defined() && sequences.numel() == x.size(0), "seq_lens", show(sequences),
          "[batch]");
  if (offsets.defined())
    require(offsets.numel() == rows, "compress_seq_offsets", show(offsets), "[batch * num_head]");
}

// A token's place in the cache: [blocks, block_size, heads, D], or with PA_NZ tiles of 32 bytes.
void check_places(In x, const at::Tensor& cache, bool tiles, const char* name,
                  const char* argument) {
  const int64_t heads = x.size(1), width = x.size(2), size = static_cast<int64_t>(x.element_size());
  if (!tiles) {
    require(cache.dim() == 4 && cache.size(2) == heads && cache.size(3) == width, argument,
            show(cache), "[num_blocks, block_size, num_head, head_size]");
    return;
  }
  const int64_t last = 32 / size;
  require(cache.dim() >= 4, argument, show(cache), "4 or 5 dimensions");
  require(width % last == 0, name, show(x), "a head size of whole 32 bytes with PA_NZ");
  require(cache.size(-1) == last &&
              (cache.dim() == 4 ? cache.size(1) == heads * width / last
                                : cache.size(1) == heads && cache.size(2) == width / last),
          argument, show(cache),
          "[num_blocks, num_head * head_size / last, block_size, last], last of 32 bytes");
  require(cache.size(-2) < 65535, argument, show(cache), "a block size below 65535");
}

// Document: attention/scatter_pa_kv_cache/docs/aclnnScatterPaKvCache.md (hicann/ops-transformer).
// Scenes 1 and 2 everywhere, 6 (key alone) on A2 and A3, 3 (compressed) on A5; torch_npu never asks
// for 4, 5 and 7. Key alone: a value without dimensions, as torch_npu sends it, or none, or an
// empty one. Pages may have gaps between them, and the caches other widths.
struct ScatterBoth {
  at::Tensor key, slot_mapping, value, compress_lens, compress_seq_offsets, seq_lens;
  Cache key_cache, value_cache;
  std::string cache_mode, scatter_mode;
  std::vector<int64_t> strides, offsets;
  FIELDS(all, key, key_cache, slot_mapping, value, value_cache, compress_lens, compress_seq_offsets,
         seq_lens, cache_mode, scatter_mode, strides, offsets)

  bool tiles() const { return cache_mode == "PA_NZ" || key_cache.tiled; }
  bool alone() const {
    return !value.defined() || value.dim() == 0 || (value.dim() == 1 && value.numel() == 0);
  }

  void check() const {
    const bool tiles = this->tiles(), alone = this->alone();
    const auto dtypes = moved_dtypes(key.defined() && key.dim() == 3);
    check_table({{"key", key, true, dtypes, 3, 4, kDocument},
                 {"key_cache", *key_cache, true, dtypes, 4, 5, kDocument},
                 {"slot_mapping", slot_mapping, true, kIndices, 1, 2, kDocument},
                 {"value", value, false, dtypes, 0, 4, kDocument},
                 {"value_cache", *value_cache, !alone, dtypes, 0, 5, kDocument},
                 {"compress_lens", compress_lens, false, kIndices, 1, 2, kDocument},
                 {"compress_seq_offsets", compress_seq_offsets, false, kIndices, 1, 1, kDocument},
                 {"seq_lens", seq_lens, false, kIndices, 1, 1, kDocument}});
    require(tiles || cache_mode.empty() || cache_mode == "Norm", "cache_mode", cache_mode,
            "Norm or PA_NZ");
    require(scatter_mode.empty() || scatter_mode == "None", "scatter_mode", scatter_mode,
            "None (the others are not emulated)");
    const Named compression = {{"compress_lens", compress_lens},
                               {"compress_seq_offsets", compress_seq_offsets},
                               {"seq_lens", seq_lens}};
    check_index_dtypes(slot_mapping, compression);
    const auto filled = [](Named arguments) {
      for (const auto& [argument, x] : arguments)
        require(x.numel() > 0, argument, show(x), "no empty tensor");
    };
    filled({{"key", key}, {"key_cache", *key_cache}, {"slot_mapping", slot_mapping}});
    if (alone)
      require(!on_a5() && !tiles, "value", show(value),
              "a value (key alone: A2 and A3, cache_mode Norm)");
    else
      filled({{"value", value}, {"value_cache", *value_cache}});
    require(key_cache->scalar_type() == key.scalar_type(), "key_cache", show(*key_cache),
            "the dtype of key");
    require(alone || value_cache->scalar_type() == value.scalar_type(), "value_cache",
            show(*value_cache), "the dtype of value");
    require(alone || tiles || value.scalar_type() == key.scalar_type(), "value", show(value),
            "the dtype of key");
    if (key.dim() == 4) {
      require(on_a5(), "key", show(key), "three dimensions (four: Ascend 950 only)");
      require(!tiles, "cache_mode", cache_mode, "Norm with a key of four dimensions");
      require(value.dim() == 4 && value.sizes().slice(0, 3) == key.sizes().slice(0, 3), "value",
              show(value), "the first three dimensions of key");
      require(compress_seq_offsets.defined(), "compress_seq_offsets", "nothing",
              "[batch * num_head]");
      check_compressed(key, *key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens,
                       "key_cache");
      check_compressed(value, *value_cache, slot_mapping, compress_lens, compress_seq_offsets,
                       seq_lens, "value_cache");
      return;
    }
    check_not_compressed(compression);
    require(slot_mapping.dim() == 1 && slot_mapping.size(0) == key.size(0), "slot_mapping",
            show(slot_mapping), "a slot for each token");
    check_places(key, *key_cache, tiles, "key", "key_cache");
    if (alone) return;
    require(value_cache.tiled == key_cache.tiled, "value_cache", show(*value_cache),
            "the format of key_cache");
    require(value.dim() == 3 && value.size(0) == key.size(0) && value.size(1) == key.size(1),
            "value", show(value), "the first two dimensions of key");
    check_places(value, *value_cache, tiles, "value", "value_cache");
  }

  void run() const {
    if (key.dim() == 4) {
      store_compressed(key, key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens);
      store_compressed(value, value_cache, slot_mapping, compress_lens, compress_seq_offsets,
                       seq_lens);
      return;
    }
    store_tokens(key, key_cache, slot_mapping, tiles());
    if (!alone()) store_tokens(value, value_cache, slot_mapping, tiles());
  }
};

// Document: attention/scatter_pa_cache/docs/aclnnScatterPaCache.md (hicann/ops-transformer). Ascend
// 950 only.
struct ScatterOne {
  at::Tensor key, slot_mapping, compress_lens, compress_seq_offsets, seq_lens;
  Out key_cache;
  std::string cache_mode;
  FIELDS(all, key, key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens,
         cache_mode)

  void check() const {
    require_generation(kOnA5);
    auto dtypes = moved_dtypes(true);
    check_table({{"key", key, true, dtypes, 3, 4, kDocument},
                 {"key_cache", *key_cache, true, dtypes, 4, 4, kDocument},
                 {"slot_mapping", slot_mapping, true, kIndices, 1, 2, kDocument},
                 {"compress_lens", compress_lens, false, kIndices, 1, 2, kDocument},
                 {"compress_seq_offsets", compress_seq_offsets, false, kIndices, 1, 1, kDocument},
                 {"seq_lens", seq_lens, false, kIndices, 1, 1, kDocument}});
    const Named compression = {{"compress_lens", compress_lens},
                               {"compress_seq_offsets", compress_seq_offsets},
                               {"seq_lens", seq_lens}};
    check_index_dtypes(slot_mapping, compression);
    require(key_cache->scalar_type() == key.scalar_type(), "key_cache", show(*key_cache),
            "the dtype of key");
    for (const auto& [argument, x] :
         Named{{"key", key}, {"key_cache", *key_cache}, {"slot_mapping", slot_mapping}})
      require(x.is_contiguous(), argument, show(x) + " with gaps", "a contiguous tensor");
    if (key.dim() == 4) {
      require(c10::elementSize(key.scalar_type()) > 1 || !at::isFloatingType(key.scalar_type()),
              "key", show(key), "three dimensions with FP8 and FP4");
      check_compressed(key, *key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens,
                       "key_cache");
      return;
    }
    check_not_compressed(compression);
    require(slot_mapping.dim() == 1 && slot_mapping.size(0) == key.size(0), "slot_mapping",
            show(slot_mapping), "a slot for each token");
    check_places(key, *key_cache, false, "key", "key_cache");
  }

  void run() const {
    if (key.dim() == 4)
      store_compressed(key, key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens);
    else
      store_tokens(key, key_cache, slot_mapping, false);
  }
};

// Document: attention/gather_pa_kv_cache/docs/aclnnGatherPaKvCache.md (hicann/ops-transformer).
struct Gather {
  at::Tensor key_cache, value_cache, block_tables, seq_lens, seq_offset;
  Out key, value;
  std::string cache_mode;
  bool is_seq_lens_cumsum;
  FIELDS(all, key_cache, value_cache, block_tables, seq_lens, key, value, seq_offset, cache_mode,
         is_seq_lens_cumsum)

  void check() const {
    const auto dtypes = moved_dtypes(false);
    const Types indices = on_a5() ? kIndices : Types{at::kInt};
    check_table({{"key_cache", key_cache, true, dtypes, 4, 4, kDocument},
                 {"value_cache", value_cache, true, dtypes, 4, 4, kDocument},
                 {"block_tables", block_tables, true, indices, 2, 2, kDocument},
                 {"seq_lens", seq_lens, true, indices, 1, 1, kDocument},
                 {"key", *key, true, dtypes, 3, 3, kDocument},
                 {"value", *value, true, dtypes, 3, 3, kDocument},
                 {"seq_offset", seq_offset, false, indices, 1, 1, kDocument}});
    require(cache_mode == "Norm", "cache_mode", cache_mode, "Norm (PA_NZ is not emulated)");
    check_index_dtypes(block_tables, {{"seq_lens", seq_lens}, {"seq_offset", seq_offset}});
    require(key_cache.scalar_type() == value_cache.scalar_type() ||
                (key_cache.scalar_type() == at::kFloat8_e4m3fn &&
                 (value_cache.scalar_type() == kF16 || value_cache.scalar_type() == kBF16)),
            "value_cache", show(value_cache), "the dtype of key_cache");
    require(key_cache.size(0) == value_cache.size(0) && key_cache.size(1) == value_cache.size(1),
            "value_cache", show(value_cache), "blocks and block size of key_cache");
    require(key_cache.size(1) > 0, "key_cache", show(key_cache),
            "a block size above 0");  // our reading
    require(block_tables.numel() > 0 && block_tables.is_contiguous(), "block_tables",
            show(block_tables), "a contiguous tensor, not empty");
    require(
        seq_lens.is_contiguous() && seq_lens.size(0) == block_tables.size(0) + is_seq_lens_cumsum,
        "seq_lens", show(seq_lens), "[batch], or [batch + 1] sums");
    if (seq_offset.defined())
      require(seq_offset.is_contiguous() && seq_offset.size(0) == block_tables.size(0),
              "seq_offset", show(seq_offset), "[batch]");
    const auto rows = [](In cache, Out x, const char* argument) {
      require(
          x->scalar_type() == cache.scalar_type() && x->sizes().slice(1) == cache.sizes().slice(2),
          argument, show(*x), "[num_tokens, num_heads, head_size] in the dtype of its cache");
      require(x->size(1) * x->size(2) * static_cast<int64_t>(x->element_size()) <= 148 * 1024,
              argument, show(*x), "a token of at most 148k bytes");
    };
    rows(key_cache, key, "key");
    rows(value_cache, value, "value");
    require(key->size(0) == value->size(0), "value", show(*value), "the tokens of key");
  }

  void run() const {
    const int64_t blocks = key_cache.size(0), block = key_cache.size(1), tokens = key->size(0);
    const Slots length(seq_lens, INT64_MAX), id(block_tables, blocks),
        offset(seq_offset.defined() ? seq_offset : block_tables, INT64_MAX);
    int64_t to = 0;
    if (is_seq_lens_cumsum && length.values[0] != 0)
      throw Fault(kKernelFault, "argument 'seq_lens': sums that do not begin with 0");
    key.touch();
    value.touch();
    for (size_t b = 0; b < static_cast<size_t>(block_tables.size(0)); ++b) {
      const int64_t count =
          is_seq_lens_cumsum ? length.values[b + 1] - length.values[b] : length.values[b];
      if (count < 0 || count > tokens - to)
        throw Fault(kKernelFault, "argument 'seq_lens': sequence " + text(static_cast<int64_t>(b)) +
                                      " of " + text(count) + " tokens in a result of " +
                                      text(tokens));
      const int64_t first = seq_offset.defined() ? offset.values[b] / block : 0;
      for (int64_t done = 0; done < count; done += block) {
        const int64_t column = first + done / block, n = std::min(block, count - done);
        if (column < 0 || column >= block_tables.size(1))
          throw Fault(kKernelFault, "argument 'block_tables': column " + text(column) + " of " +
                                        text(block_tables.size(1)));
        const int64_t from =
            id.values[b * static_cast<size_t>(block_tables.size(1)) + static_cast<size_t>(column)];
        if (from < 0 || from >= blocks)
          throw Fault(kKernelFault,
                      "argument 'block_tables': block " + text(from) + " of " + text(blocks));
        key->slice(0, to + done, to + done + n).copy_(key_cache.select(0, from).slice(0, 0, n));
        value->slice(0, to + done, to + done + n).copy_(value_cache.select(0, from).slice(0, 0, n));
      }
      to += count;  // tokens behind the last sequence are not written: kReading
    }
  }
};

}  // namespace

NAMED(aclnnScatterPaKvCache, ScatterBoth, all, check, run)
NAMED(aclnnScatterPaCache, ScatterOne, all, check, run)
NAMED(aclnnGatherPaKvCache, Gather, all, check, run)

}  // namespace softnpu
