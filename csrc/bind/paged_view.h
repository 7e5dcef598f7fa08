// Block tables, offsets and paged caches as CPU kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/paged.h"

namespace dsv4::bind {

// int32 of one or two dimensions, any strides.
cpu::Int32Matrix integers_of(const at::Tensor& tensor);

cpu::Batch batch_of(const at::Tensor& query_start_loc, const at::Tensor& seq_lens);

// The rows of a cache [num_blocks, block_size, ...] of adjacent elements.
cpu::PagedRows rows_of_pages(const at::Tensor& cache, const at::Tensor& block_table);

}  // namespace dsv4::bind
