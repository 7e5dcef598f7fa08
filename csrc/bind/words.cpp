#include "words.h"

#include <c10/core/Layout.h>
#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <vector>

namespace dsv4::bind {

std::string tuple_words(c10::IntArrayRef values) {
  return c10::str("(", c10::Join(", ", values), values.size() == 1 ? ",)" : ")");
}

std::string shape_words(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    const auto sizes = tensor.sym_sizes();
    return c10::str("shape (", c10::Join(", ", sizes), sizes.size() == 1 ? ",)" : ")");
  }
  return c10::str("shape ", tuple_words(tensor.sizes()));
}

std::string dtype_words(c10::ScalarType type) {
  return c10::str("torch.", c10::getDtypeNames(type).first);
}

std::string number_words(double value) {
  if (std::isnan(value)) {
    return "nan";
  }
  if (std::isinf(value)) {
    return value < 0 ? "-inf" : "inf";
  }
  // Python's choice: digits with an exponent below 1e-4 and from 1e16 on.
  const double magnitude = std::fabs(value);
  const bool plain = value == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
  char text[32];
  const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
  const auto end = std::to_chars(text, text + sizeof(text), value, format).ptr;
  const std::string words(text, end);
  return words.find_first_of(".e") == std::string::npos ? words + ".0" : words;
}

std::string index_words(c10::IntArrayRef sizes, int64_t i) {
  std::vector<int64_t> index(sizes.size());
  for (size_t axis = sizes.size(); axis-- > 0;) {
    index[axis] = i % sizes[axis];
    i /= sizes[axis];
  }
  return c10::str("[", c10::Join(", ", index), "]");
}

std::string layout_words(c10::Layout layout) {
  if (layout == c10::Layout::Sparse) {
    return "torch.sparse_coo";
  }
  std::string words = c10::str("torch.", layout);
  std::transform(words.begin(), words.end(), words.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return words;
}

}  // namespace dsv4::bind
