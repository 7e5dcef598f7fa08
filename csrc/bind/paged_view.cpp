#include "paged_view.h"

namespace dsv4::bind {

cpu::Int32Matrix integers_of(const at::Tensor& tensor) {
  const bool matrix = tensor.dim() == 2;
  const int64_t columns = tensor.dim() - 1;
  return {tensor.const_data_ptr<int32_t>(), matrix ? tensor.size(0) : 1, tensor.size(columns),
          matrix ? tensor.stride(0) : 0, tensor.stride(columns)};
}

cpu::Batch batch_of(const at::Tensor& query_start_loc, const at::Tensor& seq_lens) {
  return {integers_of(query_start_loc), integers_of(seq_lens)};
}

cpu::PagedRows rows_of_pages(const at::Tensor& cache, const at::Tensor& block_table) {
  const auto bytes = static_cast<int64_t>(cache.element_size());
  return {static_cast<char*>(const_cast<void*>(cache.const_data_ptr())),
          cache.size(0),
          cache.size(1),
          cache.stride(0) * bytes,
          cache.stride(1) * bytes,
          integers_of(block_table)};
}

}  // namespace dsv4::bind
