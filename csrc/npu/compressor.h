// aclnn functions of the KV compressor (spec/ascend-operators.md 4.9 C).
#pragma once

#include "function.h"

namespace dsv4::npu {

// Tokens into the state, and each block that closes pooled into a row; no norm, no rotation. Rows
// behind those are not written. Page 0 of the table stands for no page.
struct Compressor {
  static constexpr const char* symbol = "aclnnCompressor";
  static constexpr std::array versions = {Version{Package::builtin, kA3 | kA5, {9, 1}}};
  static constexpr int64_t kAbsolute = 1;  // cache_mode
  In x, wkv, wgate;
  Out state_cache;
  In ape;
  OptionalIn state_block_table, cu_seqlens, seqused, start_pos;
  Int cmp_ratio, coff, cache_mode, state_cache_stride_dim0;
  Out cmp_kv;
  DSV4_ARGUMENTS(x, wkv, wgate, state_cache, ape, state_block_table, cu_seqlens, seqused, start_pos,
                 cmp_ratio, coff, cache_mode, state_cache_stride_dim0, cmp_kv)
};

}  // namespace dsv4::npu
