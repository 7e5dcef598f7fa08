// aclnn functions that write paged caches (spec/ascend-operators.md 4.16, 12.11).
#pragma once

#include "function.h"

namespace dsv4::npu {

// Rows to flat slots of two caches, on A2 and A3 of one; negative slots are skipped.
struct ScatterPaKvCache {
  static constexpr const char* symbol = "aclnnScatterPaKvCache";
  static constexpr std::array versions = {Version{Package::builtin, kA2 | kA3, {8, 3}},
                                          Version{Package::builtin, kA5, {9, 0}}};
  In key;
  Out key_cache;
  In slot_mapping;
  OptionalIn value;
  OptionalOut value_cache;
  OptionalIn compress_lens, compress_seq_offsets, seq_lens;
  Text cache_mode, scatter_mode;
  Ints strides, offsets;
  DSV4_ARGUMENTS(key, key_cache, slot_mapping, value, value_cache, compress_lens,
                 compress_seq_offsets, seq_lens, cache_mode, scatter_mode, strides, offsets)
};

struct ScatterPaCache {  // rows to flat slots of one cache
  static constexpr const char* symbol = "aclnnScatterPaCache";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 0}}};
  In key;
  Out key_cache;
  In slot_mapping;
  OptionalIn compress_lens, compress_seq_offsets, seq_lens;
  Text cache_mode;
  DSV4_ARGUMENTS(key, key_cache, slot_mapping, compress_lens, compress_seq_offsets, seq_lens,
                 cache_mode)
};

// Window keys and entries to flat slots of rows: bf16 RoPE channels, e4m3 codes, scales per group,
// zeros up to 32 bytes; slot -1 is skipped.
struct KvCompressEpilog {
  static constexpr const char* symbol = "aclnnKvCompressEpilog";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kGroup = 64, kRope = 64, kLargestRow = 8192;
  static constexpr int64_t kBf16Scales = 0;  // quant_mode
  Out kv_compress_cache;
  In x, slot_mapping;
  Int quant_group_size, quant_mode;
  Flag round_scale;
  Single x_scale;
  DSV4_ARGUMENTS(kv_compress_cache, x, slot_mapping, quant_group_size, quant_mode, round_scale,
                 x_scale)
};

// Index keys in e4m3 with one fp32 scale each to flat slots; slot -1 is skipped.
struct IndexerQuantCache {
  static constexpr const char* symbol = "aclnnIndexerQuantCache";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 1}}};
  static constexpr int64_t kRowScales = 1;  // quant_mode
  Out cache, cache_scale;
  In x, slot_mapping;
  Int quant_mode;
  Flag round_scale;
  Single x_scale;
  DSV4_ARGUMENTS(cache, cache_scale, x, slot_mapping, quant_mode, round_scale, x_scale)
};

}  // namespace dsv4::npu
