#include "relations.h"

#include <c10/util/StringUtil.h>

#include <map>
#include <stdexcept>

#include "common/error.h"
#include "relation_call.h"
#include "words.h"

namespace dsv4::bind {
namespace {

// The one kind that reads no values: a condition.
void check_require(const Call& call) {
  const auto holds = call.term(0);
  if (holds && *holds == 0) {
    call.reject();
  }
}

const std::map<std::string, void (*)(const Call&)>& kinds() {
  static const std::map<std::string, void (*)(const Call&)> by_name{
      {"require", check_require},
      {"batch", check_batch},
      {"table", check_table},
      {"bound", check_bound},
      {"range", check_range},
      {"looked_up", check_looked_up},
      {"of_tokens", check_of_tokens},
      {"distinct", check_distinct},
      {"distinct_rows", check_distinct_rows},
      {"offsets", check_offsets},
      {"trailing", check_trailing},
      {"finite", check_finite},
      {"positive", check_positive},
      {"bf16", check_bf16},
      {"numbers", check_numbers},
      {"finite_largest", check_finite_largest},
  };
  return by_name;
}

bool is_given(const c10::IValue& value) {
  return !value.isNone() && (!value.isTensor() || value.toTensor().defined());
}

bool has_sizes(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

int64_t size_along(const at::Tensor& tensor, size_t axis) {
  if (!has_sizes(tensor)) {
    return kUnbound;
  }
  return axis < static_cast<size_t>(tensor.dim()) ? tensor.size(static_cast<int64_t>(axis)) : 0;
}

int64_t fact_value(const Fact& fact, const c10::IValue& value) {
  if (fact.of != 'g' && !is_given(value)) {
    return kUnbound;
  }
  switch (fact.of) {
    case 'g':
      return is_given(value);
    case 'r':
      return value.toTensor().dim();
    case 's':
      return size_along(value.toTensor(), fact.axis);
    case '8':
      return value.toTensor().scalar_type() == at::kFloat8_e4m3fn;
    default:  // '+'; a symbol of torch.compile has no value
      return value.isSymFloat() || value.isSymInt() ? kUnbound : value.toDouble() > 0;
  }
}

std::string shown(const Call& call, const Piece& piece, const std::string& value,
                  const std::string& index) {
  const c10::IValue& argument = call.arguments[piece.position];
  switch (piece.shown) {
    case 't':
      return wide_words(piece.term->wide(call.numbers).value_or(0));
    case 's':
      return tuple_words(argument.toTensor().sizes());
    case 'd':
      return dtype_words(argument.toTensor().scalar_type());
    case 'n':
      return std::to_string(argument.toInt());
    case 'v':
      return value;
    case 'i':
      return index;
    default:
      return "";
  }
}

std::string filled(const Call& call, const Words& words, const std::string& value,
                   const std::string& index) {
  std::string text;
  for (const Piece& piece : words) {
    text += piece.text + shown(call, piece, value, index);
  }
  return text;
}

// Relations between values are of those that are given; conditions may ask what is.
bool applies(const RelationRule& rule, Arguments arguments) {
  for (const size_t position : rule.positions) {
    if (rule.reads_values && !is_given(arguments[position])) {
      return false;
    }
  }
  return true;
}

void check_relations(const Specification& specification, Arguments arguments, Sizes& numbers,
                     bool values) {
  for (const RelationRule& rule : specification.relations) {
    if (rule.reads_values == values && applies(rule, arguments)) {
      rule.check(Call{specification, rule, arguments, numbers});
    }
  }
}

}  // namespace

RelationRule::RelationRule(const std::string& kind, std::vector<std::string> names,
                           std::vector<size_t> positions, std::vector<Term> terms, Words found,
                           Words expected)
    : names(std::move(names)),
      positions(std::move(positions)),
      terms(std::move(terms)),
      found(std::move(found)),
      expected(std::move(expected)) {
  const auto known = kinds().find(kind);
  if (known == kinds().end()) {
    throw std::invalid_argument("'" + kind + "' is no kind of relation");
  }
  check = known->second;
  reads_values = check != check_require;
}

void Call::set_sequence(int64_t new_tokens, int64_t length) const {
  numbers[specification.new_tokens] = new_tokens;
  numbers[specification.new_tokens + 1] = length;
}

void Call::set_position(int64_t position) const {
  numbers[specification.new_tokens + 2] = position;
}

void Call::reject(const std::string& value, const std::string& index) const {
  reject(0, filled(*this, rule.found, value, index), filled(*this, rule.expected, value, index));
}

void Call::reject(size_t i, const std::string& found, const std::string& expected) const {
  throw ArgumentError(specification.op, rule.names[i], found, expected);
}

void check_shapes(const Specification& specification, Arguments arguments, Sizes& sizes) {
  for (const Fact& fact : specification.facts) {
    sizes[fact.name] = fact_value(fact, arguments[fact.position]);
  }
  check_relations(specification, arguments, sizes, false);
}

void check_contents(const Specification& specification, Arguments arguments, Sizes& sizes) {
  check_relations(specification, arguments, sizes, true);
}

}  // namespace dsv4::bind
