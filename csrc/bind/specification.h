// The argument rules of an operator, as its contract's specification lines say them, and the one
// check of a call against them. Words of errors are those of dsv4_backend.errors.argument_error.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dsv4::bind {

using Arguments = c10::ArrayRef<c10::IValue>;
using Sizes = c10::SmallVector<int64_t, 16>;  // a call's values of the names; no heap for them

// A dimension such as 7, d, n*(n+2), d/2 (exact half) or K^32 (ceiling division), as a program for
// a stack of numbers. Names are numbered by the Specification that they belong to.
class Term {
 public:
  struct Step {
    char operation;  // 'n' pushes a number, 'v' the value of a name, else one of + * / ^ of the two
                     // on top
    int64_t value;
  };

  Term(std::string text, std::vector<Step> program)
      : text_(std::move(text)), program_(std::move(program)) {}

  const std::string& text() const { return text_; }
  // The number of the only name, or -1 when the term is anything more.
  int64_t lone_name() const;
  // Nothing while a name in it is unbound.
  std::optional<int64_t> value(const Sizes& sizes) const;

 private:
  std::string text_;
  std::vector<Step> program_;
};

constexpr int64_t kUnbound = INT64_MIN;

struct TensorRule {
  std::string name;
  std::string text;  // the specification line, for messages
  size_t position;
  bool optional;
  bool written;
  std::vector<c10::ScalarType> dtypes;
  int64_t dtype_of;  // position of the argument whose dtype it must have, -1 for none
  std::string dtype_of_name;
  std::vector<Term> dims;
  bool any_leading;
  std::optional<Term> low;  // values in [low, high), without end if high is nothing
  std::optional<Term> high;
};

struct ScalarRule {
  std::string name;
  size_t position;
  std::string expected;  // the rule in words
  std::optional<Term> low;
  bool low_open;
  std::optional<Term> high;
  bool finite;
};

struct Specification {
  std::string op;
  size_t names;  // how many names its terms have
  std::vector<std::pair<size_t, size_t>>
      integers;  // (name, position of the integer argument that it stands for)
  std::vector<TensorRule> tensors;
  std::vector<ScalarRule> scalars;
};

// Throws ArgumentError unless dtype, rank, shape, layout and device of every tensor and the value
// of every scalar fit. Shapes that are symbols (torch.compile) are left to the call that has
// numbers. Returns the values of the names.
Sizes check_arguments(const Specification& specification, Arguments arguments);

// Whether values of all tensor arguments can be read here without a device's help.
bool on_host(const Specification& specification, Arguments arguments);

// Throws ArgumentError when a written argument shares memory, or when an index is out of its range.
// For host tensors.
void check_memory(const Specification& specification, Arguments arguments);
void check_values(const Specification& specification, Arguments arguments, const Sizes& sizes);

}  // namespace dsv4::bind
