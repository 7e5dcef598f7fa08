#include "cpu/cache_bytes.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

using cpu::PageLayout;
using cpu::RowCodec;

cpu::EntrySlots entries_of(const PageLayout& layout, const at::Tensor& cache,
                           const at::Tensor& slots) {
  return {layout,
          static_cast<uint8_t*>(const_cast<void*>(cache.const_data_ptr())),
          cache.size(0),
          cache.stride(0),
          slots.const_data_ptr<int64_t>(),
          slots.stride(0),
          slots.size(0)};
}

void write(const PageLayout& layout, const at::Tensor& cache, const at::Tensor& rows,
           const at::Tensor& slots) {
  cpu::write_entries(entries_of(layout, cache, slots), dtype_of(rows),
                     static_cast<const char*>(rows.const_data_ptr()),
                     rows.stride(0) * static_cast<int64_t>(rows.element_size()));
}

at::Tensor read(const PageLayout& layout, const at::Tensor& cache, const at::Tensor& slots) {
  at::Tensor rows = new_tensor({slots.size(0), layout.channels}, at::kFloat);
  cpu::read_entries(entries_of(layout, cache, slots), rows.mutable_data_ptr<float>());
  return rows;
}

WhyNot not_pages(const at::Tensor& cache) { return not_float_rows("cache", cache); }

// Rows with RoPE channels.
template <auto layout>
struct Latents {
  static WhyNot cannot_write(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                             const at::Tensor&, int64_t, int64_t) {
    return first(not_pages(cache), not_float_rows("rows", rows));
  }

  static void write_rows(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                         int64_t block_size, int64_t rope) {
    write(layout(rows.size(1), rope, block_size), cache, rows, slots);
  }

  static WhyNot cannot_read(const Context&, const at::Tensor& cache, const at::Tensor&, int64_t,
                            int64_t, int64_t) {
    return not_pages(cache);
  }

  static at::Tensor read_rows(const at::Tensor& cache, const at::Tensor& slots, int64_t block_size,
                              int64_t channels, int64_t rope) {
    return read(layout(channels, rope, block_size), cache, slots);
  }
};

template <RowCodec codec>
struct Keys {
  static WhyNot cannot_write(const Context&, const at::Tensor& cache, const at::Tensor& rows,
                             const at::Tensor&, int64_t) {
    return first(not_pages(cache), not_float_rows("rows", rows));
  }

  static void write_rows(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots,
                         int64_t block_size) {
    write(cpu::layout_keys(codec, rows.size(1), block_size), cache, rows, slots);
  }

  static WhyNot cannot_read(const Context&, const at::Tensor& cache, const at::Tensor&, int64_t,
                            int64_t) {
    return not_pages(cache);
  }

  static at::Tensor read_rows(const at::Tensor& cache, const at::Tensor& slots, int64_t block_size,
                              int64_t channels) {
    return read(cpu::layout_keys(codec, channels, block_size), cache, slots);
  }
};

template <class Rows>
struct Registration {
  PortableRegistration<&Rows::cannot_write, &Rows::write_rows> write;
  PortableRegistration<&Rows::cannot_read, &Rows::read_rows> read;

  explicit Registration(const std::string& format)
      : write("write_cache_" + format), read("read_cache_" + format) {}
};

const Registration<Latents<&cpu::layout_fp8_ds_mla>> fp8_ds_mla("fp8_ds_mla");
const Registration<Latents<&cpu::layout_a5>> a5("a5");
const Registration<Latents<&cpu::layout_kv_epilog>> kv_epilog("kv_epilog");
const Registration<Keys<RowCodec::row_fp8>> indexer_fp8("indexer_fp8");
const Registration<Keys<RowCodec::token_fp8>> indexer_token_fp8("indexer_token_fp8");
const Registration<Keys<RowCodec::token_int8>> indexer_int8("indexer_int8");

}  // namespace
}  // namespace dsv4::bind
