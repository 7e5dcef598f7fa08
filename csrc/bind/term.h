// Numbers that a contract writes down as text, as programs for a stack of numbers: dimensions and
// bounds (n*(n+2), K^32) and the conditions of its relations (1 <= F and 2 * F <= hd).
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dsv4::bind {

using Sizes = c10::SmallVector<int64_t, 32>;  // a call's values of the names; no heap for them
constexpr int64_t kUnbound = INT64_MIN;

__extension__ using Wide = __int128;  // products of two sizes fit

std::string wide_words(Wide value);

// Names are numbered by the Specification that they belong to.
class Term {
 public:
  // 'n' pushes a number, 'v' the value of a name; '~' (minus) and '!' (not) take one from the
  // stack, '?' takes a choice (no, yes, condition), all others the two on top: + - * & % as in
  // Python, '/' (exact half), '^' (ceiling division), 'f' (Python's //), 'M' (the larger),
  // < l g > = # (comparisons, l and g with equality), 'a' (and), 'o' (or).
  struct Step {
    char operation;
    int64_t value;
  };

  Term(std::string text, std::vector<Step> program);  // std::invalid_argument for no program

  const std::string& text() const { return text_; }
  // The number of the only name, or -1 when the term is anything more.
  int64_t lone_name() const;
  // Nothing while a name in it is unbound.
  std::optional<Wide> wide(const Sizes& sizes) const;
  std::optional<int64_t> value(const Sizes& sizes) const;

 private:
  std::string text_;
  std::vector<Step> program_;
};

}  // namespace dsv4::bind
