// Values in the words of error messages, as Python writes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace dsv4::bind {

std::string tuple_words(c10::IntArrayRef values);   // (3, 4) and (3,)
std::string shape_words(const at::Tensor& tensor);  // shape (3, 4)
std::string dtype_words(c10::ScalarType type);      // torch.float32
std::string number_words(double value);             // the shortest text that reads back, nan, inf
std::string index_words(c10::IntArrayRef sizes,
                        int64_t i);            // [row, column] of element i in row-major order
std::string layout_words(c10::Layout layout);  // torch.sparse_coo

}  // namespace dsv4::bind
