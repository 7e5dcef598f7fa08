#include "check.h"

#include <algorithm>
#include <cstdio>
#include <sstream>

namespace softnpu {

std::string show(In x) {
  if (!x.defined()) return "nothing";
  std::ostringstream out;
  out << x.scalar_type() << " " << x.sizes();
  return out.str();
}

std::string show(const Types& types) {
  std::ostringstream out;
  for (const auto type : types) {
    out << (type == types.front() ? "" : " or ");
    type == kNone ? out << "nothing" : out << type;
  }
  return out.str();
}

void refuse(const std::string& argument, const std::string& found, const std::string& expected) {
  throw Fault(kNnParameter,
              "argument '" + argument + "': found " + found + ", expected " + expected);
}

void require(bool condition, const char* argument, const std::string& found, const char* expected) {
  if (!condition) refuse(argument, found, expected);
}

void expect_values(In x, int64_t first, int64_t end, const char* argument) {
  const at::Tensor values = x.reshape({-1}).to(at::kLong);
  const at::Tensor outside = values.masked_select(values.lt(first).logical_or(values.ge(end)));
  if (outside.numel())
    throw Fault(kKernelFault, std::string("argument '") + argument + "': found the value " +
                                  text(outside[0].item<int64_t>()) + ", expected " + text(first) +
                                  " to " + text(end - 1));
}

bool here(unsigned where) {
  const Generation chip = generation();
  return where & (chip == Generation::kA2 ? kOnA2 : chip == Generation::kA3 ? kOnA3 : kOnA5);
}

bool cann_from(int major, int minor) {
  int told_major = 0, told_minor = 0;
  std::sscanf(config().cann.c_str(), "%d.%d", &told_major, &told_minor);
  return std::pair(told_major, told_minor) >= std::pair(major, minor);
}

void require_generation(unsigned where, int code) {
  if (!here(where)) throw Fault(code, "the operator does not exist on " + config().soc);
}

void check_table(const std::vector<Rule>& rules, int rank_code) {
  for (const Rule& rule : rules) {
    const at::Tensor& x = rule.tensor;
    if (!x.defined()) {
      if (rule.required)
        throw Fault(kNnNullptr, std::string("argument '") + rule.argument + "' is null");
      continue;
    }
    const std::string mark = rule.source == kReading ? " (our reading of the document)" : "";
    if (std::find(rule.dtypes.begin(), rule.dtypes.end(), x.scalar_type()) == rule.dtypes.end())
      refuse(rule.argument, show(x), show(rule.dtypes) + mark);
    refusing_with(rank_code, [&] {
      if (x.dim() < rule.lowest_rank || x.dim() > rule.highest_rank)
        refuse(rule.argument, show(x),
               text(rule.lowest_rank) + " to " + text(rule.highest_rank) + " dimensions" + mark);
    });
  }
}

}  // namespace softnpu
