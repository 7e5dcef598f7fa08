// Where the rows of a tensor are: the last dimension is one row of adjacent elements, the leading
// ones have any strides.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace dsv4 {

class RowLayout {
 public:
  // Sizes and strides of all dimensions, at least one, strides in elements.
  RowLayout(std::span<const int64_t> sizes, std::span<const int64_t> strides)
      : width_(sizes.back()) {
    if (strides.back() != 1 && width_ > 1) {
      throw std::invalid_argument("RowLayout: the last dimension must be contiguous");
    }
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      count_ *= sizes[i];
      const bool follows = !dims_.empty() && dims_.back().stride == sizes[i] * strides[i];
      if (follows) {  // two dimensions that one stride walks through
        dims_.back() = {dims_.back().size * sizes[i], strides[i]};
      } else {
        dims_.push_back({sizes[i], strides[i]});
      }
    }
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  // Distance in elements from the first row to row `index`, rows counted in row-major order.
  int64_t offset(int64_t index) const {
    int64_t elements = 0;
    for (size_t i = dims_.size(); i-- > 0;) {
      const auto [size, stride] = dims_[i];
      elements += (i == 0 ? index : index % size) * stride;
      index /= size;
    }
    return elements;
  }

 private:
  struct Dim {
    int64_t size;
    int64_t stride;
  };

  int64_t width_;
  int64_t count_ = 1;
  std::vector<Dim> dims_;
};

}  // namespace dsv4
