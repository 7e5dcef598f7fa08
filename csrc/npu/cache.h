// aclnn functions that write paged caches (spec/ascend-operators.md 4.16, 12.11).
#pragma once

#include "function.h"

namespace dsv4::npu {

struct ScatterPaKvCache {  // rows to flat slots of one or two caches; negative slots are skipped
  static constexpr const char* symbol = "aclnnScatterPaKvCache";
  static constexpr std::array versions = {Version{Package::builtin, kA2 | kA3, {8, 3}}};
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

}  // namespace dsv4::npu
