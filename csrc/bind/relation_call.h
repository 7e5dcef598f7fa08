// One relation of one call, for the checks of its kind: its arguments, its terms, its error.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "specification.h"

namespace dsv4::bind {

struct Call {
  const Specification& specification;
  const RelationRule& rule;
  Arguments arguments;
  Sizes& numbers;

  // The i-th argument of the relation.
  const at::Tensor& tensor(size_t i) const { return arguments[rule.positions[i]].toTensor(); }
  // The i-th term, nothing while a name in it is unbound.
  std::optional<Wide> term(size_t i) const { return rule.terms[i].wide(numbers); }

  // What terms may name of one sequence.
  void set_sequence(int64_t new_tokens, int64_t length) const;
  void set_position(int64_t position) const;

  // Throws ArgumentError for the first argument in the words of the relation.
  [[noreturn]] void reject(const std::string& value = "", const std::string& index = "") const;
  // Throws ArgumentError for the i-th argument.
  [[noreturn]] void reject(size_t i, const std::string& found, const std::string& expected) const;
};

// Relations that read values; each by the kind of the same name.
void check_batch(const Call& call);
void check_table(const Call& call);
void check_bound(const Call& call);
void check_range(const Call& call);
void check_looked_up(const Call& call);
void check_of_tokens(const Call& call);
void check_distinct(const Call& call);
void check_distinct_rows(const Call& call);
void check_offsets(const Call& call);
void check_trailing(const Call& call);
void check_finite(const Call& call);
void check_positive(const Call& call);
void check_bf16(const Call& call);
void check_numbers(const Call& call);
void check_finite_largest(const Call& call);

}  // namespace dsv4::bind
