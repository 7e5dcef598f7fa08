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
  throw Fault(kNnParameter, "argument '" + argument + "': found " + found + ", expected " + expected);
}

void require(bool condition, const char* argument, const std::string& found, const char* expected) {
  if (!condition) refuse(argument, found, expected);
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

void require_generation(unsigned where) {
  if (!here(where)) throw Fault(kNnParameter, "the operator does not exist on " + config().soc);
}

void check_table(const std::vector<Rule>& rules, std::initializer_list<at::Tensor> tensors) {
  auto tensor = tensors.begin();
  for (const Rule& rule : rules) {
    const at::Tensor& x = *tensor++;
    if (!x.defined()) {
      if (rule.required) throw Fault(kNnNullptr, std::string("argument '") + rule.argument + "' is null");
      continue;
    }
    if (std::find(rule.dtypes.begin(), rule.dtypes.end(), x.scalar_type()) == rule.dtypes.end()) {
      refuse(rule.argument, show(x), show(rule.dtypes));
    }
    if (x.dim() < rule.lowest_rank || x.dim() > rule.highest_rank)
      refuse(rule.argument, show(x),
             std::to_string(rule.lowest_rank) + " to " + std::to_string(rule.highest_rank) + " dimensions");
  }
}

}  // namespace softnpu
