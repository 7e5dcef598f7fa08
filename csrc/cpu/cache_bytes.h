// Rows of paged caches in byte formats (dsv4_backend/ops/cache_formats.py, spec/v4.md 6.5).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dsv4::cpu {

// How the channels before RoPE become codes; all but int8 are e4m3.
enum class RowCodec : uint8_t {
  tiles_e8m0,  // a power of two per 64 channels, as one byte
  tiles_bf16,  // the same, as bf16
  row_fp8,     // a power of two per row, as fp32
  token_fp8,   // amax / 448 per row, as fp32
  token_int8,  // amax / 127 per row, as fp16
};

// Where a field of entry 0 stands on a page, and how far that of the next entry is, in bytes.
struct FieldPlace {
  int64_t first = 0;
  int64_t stride = 0;
};

// A page of `block_size` entries of `channels`, the last `rope` of them RoPE channels in bf16.
struct PageLayout {
  RowCodec codec;
  int64_t channels;
  int64_t rope;
  int64_t block_size;
  FieldPlace values;
  FieldPlace scales;
  FieldPlace rotated;
  FieldPlace zeros;  // written and not read
  int64_t zero_bytes = 0;
};

PageLayout layout_fp8_ds_mla(int64_t channels, int64_t rope, int64_t block_size);
PageLayout layout_a5(int64_t channels, int64_t rope, int64_t block_size);
PageLayout layout_kv_epilog(int64_t channels, int64_t rope, int64_t block_size);
PageLayout layout_keys(RowCodec codec, int64_t channels, int64_t block_size);

// Entries of a cache of pages by flat slots; slots outside of it are none. Strides in bytes, but
// that of slots in elements.
struct EntrySlots {
  PageLayout layout;
  uint8_t* cache;
  int64_t num_blocks;
  int64_t page_stride;
  const int64_t* slots;
  int64_t slots_stride;
  int64_t count;

  // Page and number in it of the i-th entry; a null page if there is none.
  uint8_t* page(int64_t i, int64_t* entry) const;
};

// rows: [count, channels] of adjacent elements, stride in bytes.
void write_entries(const EntrySlots& to, DType dtype, const char* rows, int64_t rows_stride);

// rows: fp32 [count, channels]; 0 where there is no entry.
void read_entries(const EntrySlots& from, float* rows);

}  // namespace dsv4::cpu
