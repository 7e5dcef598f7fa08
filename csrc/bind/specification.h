// The argument rules of an operator, as its contract's specification lines say them, and the one
// check of a call against them. Words of errors are those of dsv4_backend.errors.argument_error.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "relations.h"
#include "term.h"

namespace dsv4::bind {

using Arguments = c10::ArrayRef<c10::IValue>;

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
  bool fp32;  // no larger than fp32 holds, unless infinite
};

struct Specification {
  std::string op;
  size_t names;  // how many names its terms have
  std::vector<std::pair<size_t, size_t>>
      integers;  // (name, position of the integer argument that it stands for)
  std::vector<TensorRule> tensors;
  std::vector<ScalarRule> scalars;
  size_t
      new_tokens;  // the names `new`, `length` and `position` of a sequence are this and the next
  std::vector<Fact> facts;
  std::vector<RelationRule> relations;
};

// Throws ArgumentError unless dtype, rank, shape, layout and device of every tensor and the value
// of every scalar fit. Shapes that are symbols (torch.compile) are left to the call that has
// numbers. Returns the values of the names.
Sizes check_arguments(const Specification& specification, Arguments arguments);

// Throws ArgumentError unless the relations hold that read no values. Those on sizes that are
// symbols are left to the call that has numbers. Adds to `sizes` what relations name.
void check_shapes(const Specification& specification, Arguments arguments, Sizes& sizes);

// Whether values of all tensor arguments can be read here without a device's help.
bool on_host(const Specification& specification, Arguments arguments);

// Throws ArgumentError when a written argument shares memory, or when an index is out of its range.
// For host tensors.
void check_memory(const Specification& specification, Arguments arguments);
void check_values(const Specification& specification, Arguments arguments, const Sizes& sizes);

// Throws ArgumentError unless the relations hold that read values. For host tensors.
void check_contents(const Specification& specification, Arguments arguments, Sizes& sizes);

}  // namespace dsv4::bind
