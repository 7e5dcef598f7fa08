// Relations between values that are floating point numbers.
#include <ATen/Dispatch.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "relation_call.h"
#include "words.h"

namespace dsv4::bind {
namespace {

// A float tensor [n] or [rows, columns] of any strides.
template <class T>
struct Floats {
  explicit Floats(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<T>()),
        vector(tensor.dim() == 1),
        rows(vector ? 1 : tensor.size(0)),
        columns(tensor.size(-1)),
        row_stride(vector ? 0 : tensor.stride(0)),
        stride(tensor.stride(-1)) {}

  T at(int64_t row, int64_t column) const { return data[row * row_stride + column * stride]; }

  // The first column below `end` of a row whose value fails, or `end`.
  template <class Fits>
  int64_t first_failing(int64_t row, int64_t end, Fits fits) const {
    int64_t start = 0;
    if (stride == 1) {  // whole blocks that a compiler makes vectors of
      constexpr int64_t kBlock = 64;
      const T* values = data + row * row_stride;
      for (bool fit = true; start + kBlock <= end; start += fit ? kBlock : 0) {
        for (int64_t i = 0; i < kBlock; ++i) {
          fit &= fits(values[start + i]);
        }
        if (!fit) {
          break;
        }
      }
    }
    while (start < end && fits(at(row, start))) {
      ++start;
    }
    return start;
  }

  std::string index_words(int64_t row, int64_t column) const {
    return vector ? std::to_string(column) : c10::str("[", row, ", ", column, "]");
  }

  const T* data;
  bool vector;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t stride;
};

template <class Visit>
void with_floats(const at::Tensor& tensor, Visit visit) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "relation",
                                  [&] { visit(Floats<scalar_t>(tensor)); });
}

// Argument: values. Optional term: whether they matter.
template <class Fits>
void check_each(const Call& call, Fits fits) {
  if (!call.rule.terms.empty() && call.term(0).value_or(0) == 0) {
    return;
  }
  with_floats(call.tensor(0), [&](const auto& values) {
    for (int64_t row = 0; row < values.rows; ++row) {
      const int64_t column = values.first_failing(row, values.columns, fits);
      if (column < values.columns) {
        call.reject(number_words(static_cast<double>(values.at(row, column))),
                    values.index_words(row, column));
      }
    }
  });
}

int64_t integer_at(const at::Tensor& tensor, int64_t i) {
  const int64_t element = i * tensor.stride(0);
  return tensor.scalar_type() == at::kLong ? tensor.const_data_ptr<int64_t>()[element]
                                           : tensor.const_data_ptr<int32_t>()[element];
}

// NaN before all, as torch finds the largest.
template <class T>
double largest(const Floats<T>& values, int64_t row) {
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < values.columns && !std::isnan(most); ++i) {
    const auto value = static_cast<double>(values.at(row, i));
    most = std::isnan(value) ? value : std::max(most, value);
  }
  return most;
}

}  // namespace

void check_finite(const Call& call) {
  check_each(call, [](auto value) {
    using T = decltype(value);
    return value >= std::numeric_limits<T>::lowest() && value <= std::numeric_limits<T>::max();
  });
}

void check_positive(const Call& call) {
  check_each(call, [](auto value) { return value > decltype(value)(0); });
}

// NaN or a value that bf16 holds.
void check_bf16(const Call& call) {
  check_each(call, [](auto value) {
    const c10::BFloat16 rounded(static_cast<float>(value));
    return static_cast<double>(rounded) == static_cast<double>(value) || value != value;
  });
}

// Arguments: values [rows, columns], and how many of each row count. No NaN.
void check_numbers(const Call& call) {
  const at::Tensor& counts = call.tensor(1);
  with_floats(call.tensor(0), [&](const auto& values) {
    for (int64_t row = 0; row < std::min(values.rows, counts.size(0)); ++row) {
      const int64_t end = std::clamp<int64_t>(integer_at(counts, row), 0, values.columns);
      const int64_t column =
          values.first_failing(row, end, [](auto value) { return value == value; });
      if (column < end) {
        call.reject("nan", values.index_words(row, column));
      }
    }
  });
}

// Argument: values [rows, columns] without NaN and +inf, and not -inf alone in a row.
void check_finite_largest(const Call& call) {
  with_floats(call.tensor(0), [&](const auto& values) {
    for (int64_t row = 0; row < values.rows; ++row) {
      using T = std::decay_t<decltype(values.at(0, 0))>;
      const T end = std::numeric_limits<T>::infinity();
      const bool below = values.first_failing(row, values.columns,
                                              [=](auto v) { return v < end; }) == values.columns;
      const bool any = values.first_failing(row, values.columns,
                                            [=](auto v) { return v == -end; }) < values.columns;
      if (!below || !any) {
        call.reject(number_words(largest(values, row)), std::to_string(row));
      }
    }
  });
}

}  // namespace dsv4::bind
