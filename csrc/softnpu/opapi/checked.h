// A short operator with a check: CHECKED_OP(aclnnCat, check_cat, [](Ins parts, ...) { ... }).
// `check` gets the operator's arguments in phase 1 and throws Fault(161002, ...).
#pragma once

#include "op.h"

namespace softnpu {

template <class Op>
struct Refusing {
  static constexpr bool checked = false;
  static std::vector<const char*> names() { return {}; }
  template <class Values>
  static Prepared prepared(Values values) {
    std::apply(Op::check, values);
    return {[values = std::move(values)] { std::apply(Op::kernel, values); }};
  }
};

#define CHECKED_OP(NAME, CHECK, ...)            \
  namespace {                                   \
  struct Op_##NAME : Refusing<Op_##NAME> {      \
    static constexpr const char* name = #NAME;  \
    static constexpr auto check = CHECK;        \
    static constexpr auto kernel = __VA_ARGS__; \
  };                                            \
  }                                             \
  SOFTNPU_SYMBOLS(NAME, &decltype(Op_##NAME::kernel)::operator())

}  // namespace softnpu
