#include "specification.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "common/error.h"
#include "words.h"

namespace dsv4::bind {
namespace {

// One check of one call: the sizes bound so far, and dimensions that wait for a name.
class Check {
 public:
  Check(const Specification& specification, Arguments arguments)
      : specification_(specification),
        arguments_(arguments),
        sizes_(specification.names, kUnbound) {}

  Sizes run() {
    for (const auto& [name, position] : specification_.integers) {
      if (arguments_[position].isInt()) {  // else it is a symbol of torch.compile
        // The smallest number of all means "unbound", and nothing fits it or its neighbour.
        sizes_[name] = std::max(arguments_[position].toInt(), kUnbound + 1);
      }
    }
    for (const TensorRule& rule : specification_.tensors) {
      if (!(rule.optional && arguments_[rule.position].isNone())) {
        tensor(rule, arguments_[rule.position].toTensor());
      }
    }
    for (const Pending& waiting : std::exchange(pending_, {})) {
      dimension(*waiting.rule, *waiting.tensor, *waiting.term, waiting.size);
    }
    for (const ScalarRule& rule : specification_.scalars) {
      scalar(rule);
    }
    return std::move(sizes_);
  }

 private:
  struct Pending {
    const TensorRule* rule;
    const at::Tensor* tensor;
    const Term* term;
    int64_t size;
  };

  [[noreturn]] void reject(const std::string& name, const std::string& found,
                           const std::string& expected) const {
    throw ArgumentError(specification_.op, name, found, expected);
  }

  void tensor(const TensorRule& rule, const at::Tensor& tensor) {
    if (!tensor.defined()) {  // how torch passes None
      reject(rule.name, "None", "a tensor");
    }
    if (tensor.layout() != at::kStrided) {
      reject(rule.name, c10::str("layout ", layout_words(tensor.layout())), "a strided tensor");
    }
    dtype(rule, tensor);
    const auto rank = static_cast<size_t>(tensor.dim());
    if (rule.any_leading ? rank < rule.dims.size() : rank != rule.dims.size()) {
      reject(rule.name, shape_words(tensor), rule.text);
    }
    if (!device_) {
      device_ = tensor.device();
    } else if (tensor.device() != *device_) {
      reject(rule.name, c10::str("device ", tensor.device()),
             c10::str(*device_, " like the first tensor"));
    }
    if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      return;
    }
    const auto sizes = tensor.sizes();
    for (size_t i = 0; i < rule.dims.size(); ++i) {
      dimension(rule, tensor, rule.dims[i], sizes[rank - rule.dims.size() + i]);
    }
  }

  void dtype(const TensorRule& rule, const at::Tensor& tensor) const {
    const auto found = tensor.scalar_type();
    if (std::find(rule.dtypes.begin(), rule.dtypes.end(), found) == rule.dtypes.end()) {
      reject(rule.name, dtype_words(found), rule.text);
    }
    if (rule.dtype_of >= 0) {
      const auto& first = arguments_[static_cast<size_t>(rule.dtype_of)].toTensor();
      if (first.defined() && first.scalar_type() != found) {
        reject(rule.name, dtype_words(found),
               c10::str(dtype_words(first.scalar_type()), " like ", rule.dtype_of_name));
      }
    }
  }

  void dimension(const TensorRule& rule, const at::Tensor& tensor, const Term& term, int64_t size) {
    const auto expected = term.value(sizes_);
    if (expected) {
      if (size != *expected) {
        reject(rule.name, shape_words(tensor),
               c10::str(rule.text, " with ", term.text(), " = ", *expected));
      }
    } else if (const int64_t lone = term.lone_name(); lone >= 0) {
      sizes_[static_cast<size_t>(lone)] = size;
    } else {
      pending_.push_back(Pending{&rule, &tensor, &term, size});
    }
  }

  void scalar(const ScalarRule& rule) const {
    const c10::IValue& value = arguments_[rule.position];
    if (value.isSymInt() || value.isSymFloat() || value.isNone()) {
      return;
    }
    const bool fits = value.isInt() ? inside(rule, value.toInt()) : inside(rule, value.toDouble());
    if (!fits) {
      reject(rule.name, value.isInt() ? c10::str(value.toInt()) : number_words(value.toDouble()),
             words_of(rule));
    }
  }

  // Infinite in fp32 only if it is by itself, and zero only where zero may be.
  static bool held_by_fp32(const ScalarRule& rule, double number) {
    const float narrow = static_cast<float>(number);
    const bool vanishes = narrow == 0 && number != 0;
    return std::isinf(narrow) == std::isinf(number) && !(rule.low_open && vanishes);
  }

  template <class T>
  bool inside(const ScalarRule& rule, T value) const {
    const auto edge = [&](const std::optional<Term>& bound) {
      const auto limit = bound ? bound->value(sizes_) : std::nullopt;
      return limit ? std::optional<T>(static_cast<T>(*limit)) : std::nullopt;
    };
    const auto low = edge(rule.low), high = edge(rule.high);
    const auto number = static_cast<double>(value);
    // NaN lies in no interval; a rule without bounds takes it unless it says finite.
    return (!rule.finite || std::isfinite(number)) && (!rule.fp32 || held_by_fp32(rule, number)) &&
           (!low || (rule.low_open ? value > *low : value >= *low)) && (!high || value <= *high);
  }

  std::string words_of(const ScalarRule& rule) const {
    const auto limit =
        rule.high && rule.high->lone_name() >= 0 ? rule.high->value(sizes_) : std::nullopt;
    return limit ? c10::str(rule.expected, " = ", *limit) : rule.expected;
  }

  const Specification& specification_;
  Arguments arguments_;
  Sizes sizes_;
  c10::SmallVector<Pending, 4> pending_;
  std::optional<c10::Device> device_;
};

// First byte of a tensor and the byte after its last; equal when it is empty.
std::pair<uintptr_t, uintptr_t> span_of(const at::Tensor& tensor) {
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) {
    return {start, start};
  }
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return {start, start + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
}

// How many bytes from its first one a tensor reaches, but for its steps of `period` bytes.
int64_t reach_of(const at::Tensor& tensor, int64_t period) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    const int64_t step = tensor.stride(i) * tensor.element_size();
    last += step == period ? 0 : (tensor.size(i) - 1) * step;
  }
  return last + tensor.element_size();
}

int64_t largest_step(const at::Tensor& tensor) {
  int64_t largest = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    largest = std::max(largest, tensor.size(i) > 1 ? tensor.stride(i) * tensor.element_size() : 0);
  }
  return largest;
}

// Whether two tensors may share bytes. Pages of several caches that alternate in one buffer, as in
// an engine's packed blocks, do not: within their common step each keeps to its own place.
bool may_share(const at::Tensor& one, const at::Tensor& other) {
  const auto [start, end] = span_of(one);
  const auto [other_start, other_end] = span_of(other);
  if (std::max(start, other_start) >= std::min(end, other_end)) {
    return false;
  }
  const int64_t period = std::max(largest_step(one), largest_step(other));
  if (period == 0) {
    return true;
  }
  const int64_t between = static_cast<int64_t>(other_start - start) % period;
  const int64_t place = between < 0 ? between + period : between;
  return place < reach_of(one, period) || place + reach_of(other, period) > period;
}

bool overlaps_itself(const at::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    axes.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : axes) {
    if (size > 1 && tensor.numel() > 0) {
      if (stride <= reach) {
        return true;
      }
      reach += stride * (size - 1);
    }
  }
  return false;
}

void check_written(const Specification& specification, Arguments arguments,
                   const TensorRule& rule) {
  const at::Tensor& tensor = arguments[rule.position].toTensor();
  if (overlaps_itself(tensor)) {
    throw ArgumentError(
        specification.op, rule.name,
        c10::str("strides ", tuple_words(tensor.strides()), " of ", shape_words(tensor)),
        "elements that share no memory, because they are written");
  }
  for (const TensorRule& other : specification.tensors) {
    if (other.position == rule.position || !arguments[other.position].isTensor()) {
      continue;
    }
    if (may_share(tensor, arguments[other.position].toTensor())) {
      throw ArgumentError(specification.op, other.name, c10::str("memory of '", rule.name, "'"),
                          "its own, because the other is written");
    }
  }
}

constexpr int64_t kNoEnd = INT64_MAX;

std::string range_words(int64_t low, int64_t high) {
  return c10::str("values in [", low, ", ", high == kNoEnd ? "inf" : std::to_string(high), ")");
}

template <class T>
void check_range(const Specification& specification, const TensorRule& rule,
                 const at::Tensor& tensor, int64_t low, int64_t high) {
  const at::Tensor values = tensor.contiguous();
  const T* value = values.const_data_ptr<T>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (value[i] < low || value[i] >= high) {
      throw ArgumentError(specification.op, rule.name,
                          c10::str(value[i], " at ", index_words(values.sizes(), i)),
                          range_words(low, high));
    }
  }
}

}  // namespace

Sizes check_arguments(const Specification& specification, Arguments arguments) {
  return Check(specification, arguments).run();
}

bool on_host(const Specification& specification, Arguments arguments) {
  // Wrappers of torch's transformations have no values of their own.
  constexpr c10::DispatchKeySet wrappers{c10::DispatchKey::Python,
                                         c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::Conjugate,
                                         c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor};
  const auto readable = [&](const at::Tensor& tensor) {
    return tensor.device().is_cpu() && !tensor.key_set().has_any(wrappers) &&
           !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  return std::all_of(specification.tensors.begin(), specification.tensors.end(),
                     [&](const TensorRule& rule) {
                       const c10::IValue& value = arguments[rule.position];
                       return !value.isTensor() || readable(value.toTensor());
                     });
}

void check_memory(const Specification& specification, Arguments arguments) {
  for (const TensorRule& rule : specification.tensors) {
    if (rule.written) {
      check_written(specification, arguments, rule);
    }
  }
}

void check_values(const Specification& specification, Arguments arguments, const Sizes& sizes) {
  for (const TensorRule& rule : specification.tensors) {
    if (!rule.low || !arguments[rule.position].isTensor()) {
      continue;
    }
    const int64_t low = rule.low->value(sizes).value();
    const int64_t high = rule.high ? rule.high->value(sizes).value() : kNoEnd;
    const at::Tensor& tensor = arguments[rule.position].toTensor();
    if (tensor.scalar_type() == at::kInt) {
      check_range<int32_t>(specification, rule, tensor, low, high);
    } else {
      check_range<int64_t>(specification, rule, tensor, low, high);
    }
  }
}

}  // namespace dsv4::bind
