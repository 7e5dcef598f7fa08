#include "term.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>

namespace dsv4::bind {
namespace {

constexpr size_t kMostOperands = 8;
constexpr std::string_view kBinary = "+-*&%/^fM<lg>=#ao";

// What does not fit stays at +-kMost, and so on its side of every bound.
constexpr Wide kMost = (Wide(1) << 126) - 1;

Wide bounded(Wide value) { return std::clamp(value, -kMost, kMost); }

Wide product(Wide left, Wide right) {
  Wide result;
  if (__builtin_mul_overflow(left, right, &result)) {
    return (left < 0) == (right < 0) ? kMost : -kMost;
  }
  return bounded(result);
}

// Rounded down; 0 by 0. Division of 128 bits is slow, and nearly all numbers are small.
Wide floor_quotient(Wide left, Wide right) {
  if (right == 0) {
    return 0;
  }
  if (left >= 0 && right > 0 && left <= INT64_MAX && right <= INT64_MAX) {
    return static_cast<int64_t>(left) / static_cast<int64_t>(right);
  }
  const Wide quotient = left / right;
  return quotient - (left % right != 0 && (left < 0) != (right < 0));
}

Wide combined(char operation, Wide left, Wide right) {
  switch (operation) {
    case '+':
      return bounded(left + right);
    case '-':
      return bounded(left - right);
    case '*':
      return product(left, right);
    case '&':
      return left & right;
    case '/':
      return right == 0 ? 0 : left / right;
    case '^':
      return right == 0 ? 0 : (left + right - 1) / right;
    case 'f':
      return floor_quotient(left, right);
    case '%':
      return right == 0 ? 0 : left - floor_quotient(left, right) * right;
    case 'M':
      return std::max(left, right);
    case '<':
      return left < right;
    case 'l':
      return left <= right;
    case '>':
      return left > right;
    case 'g':
      return left >= right;
    case '=':
      return left == right;
    case '#':
      return left != right;
    case 'a':
      return left != 0 && right != 0;
    default:  // 'o'
      return left != 0 || right != 0;
  }
}

// How many values an operation takes from the stack; it leaves one.
size_t operands(char operation) {
  switch (operation) {
    case 'n':
    case 'v':
      return 0;
    case '~':
    case '!':
      return 1;
    case '?':
      return 3;
    default:
      return kBinary.find(operation) == std::string_view::npos ? kMostOperands + 1 : 2;
  }
}

}  // namespace

std::string wide_words(Wide value) {
  if (value == 0) {
    return "0";
  }
  std::string digits;
  for (Wide rest = value < 0 ? -value : value; rest > 0; rest /= 10) {
    digits += static_cast<char>('0' + static_cast<int>(rest % 10));
  }
  if (value < 0) {
    digits += '-';
  }
  return {digits.rbegin(), digits.rend()};
}

Term::Term(std::string text, std::vector<Step> program)
    : text_(std::move(text)), program_(std::move(program)) {
  size_t depth = 0;
  for (const Step& step : program_) {
    const size_t taken = operands(step.operation);
    if (taken > depth || depth - taken >= kMostOperands) {
      throw std::invalid_argument("'" + text_ + "' is no term");
    }
    depth += 1 - taken;
  }
  if (depth != 1) {
    throw std::invalid_argument("'" + text_ + "' is no term");
  }
}

int64_t Term::lone_name() const {
  return program_.size() == 1 && program_[0].operation == 'v' ? program_[0].value : -1;
}

std::optional<Wide> Term::wide(const Sizes& sizes) const {
  Wide stack[kMostOperands];
  size_t top = 0;
  for (const Step& step : program_) {
    switch (step.operation) {
      case 'n':
        stack[top++] = step.value;
        break;
      case 'v': {
        const int64_t size = sizes[static_cast<size_t>(step.value)];
        if (size == kUnbound) {
          return std::nullopt;
        }
        stack[top++] = size;
        break;
      }
      case '~':
        stack[top - 1] = -stack[top - 1];
        break;
      case '!':
        stack[top - 1] = stack[top - 1] == 0;
        break;
      case '?':
        top -= 2;
        stack[top - 1] = stack[top + 1] != 0 ? stack[top] : stack[top - 1];
        break;
      default:
        --top;
        stack[top - 1] = combined(step.operation, stack[top - 1], stack[top]);
    }
  }
  return stack[0];
}

std::optional<int64_t> Term::value(const Sizes& sizes) const {
  const auto found = wide(sizes);
  if (!found) {
    return std::nullopt;
  }
  return static_cast<int64_t>(std::clamp<Wide>(*found, INT64_MIN, INT64_MAX));
}

}  // namespace dsv4::bind
