// How a short operator is written: OP(aclnnMul, [](In a, In b, Out o) { o = at::mul(a, b); })
// One with a check or many arguments has a struct, a list of its fields in the order of the C
// signature, and functions of it:
//   struct Norm { at::Tensor x; double eps; Out y; FIELDS(all, x, eps, y) void check() const; void
//   run() const; }; NAMED(aclnnNorm, Norm, all, check, run)
// The types of parameters or fields give the C signature of phase 1 (A.4 of the ABI notes); phase 2
// is the same for all. The lambda or last function is the kernel: it runs on the stream's thread,
// as often as a graph is replayed.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <tuple>

#include "argument.h"

namespace softnpu {

struct Prepared {
  std::function<void()> kernel;
  std::function<void(const std::string&)> failed = {};  // told why, when it failed or was skipped
};
SOFTNPU_CXX void set_kernel(Builder& builder, std::function<void()> kernel);
SOFTNPU_CXX int finish(Builder& builder, Prepared prepared, uint64_t* workspace,
                       aclOpExecutor** executor);
SOFTNPU_CXX int report_exception(const char* name);  // inside a catch block
SOFTNPU_CXX int phase2(Call& call, void* workspace, uint64_t size, aclOpExecutor* executor,
                       Handle stream);

// Fields of a struct in the order of a C signature; the names are lists of them as the source has
// it.
template <size_t parts, class... Values>
struct Fields {
  std::tuple<Values&...> values;
  std::array<const char*, parts> names;
};
template <class... Values>
Fields<1, Values...> fields(const char* names, Values&... values) {
  return {{values...}, {names}};
}
template <size_t m, class... Front, size_t n, class... Back>
auto operator+(const Fields<m, Front...>& front, const Fields<n, Back...>& back) {
  Fields<m + n, Front..., Back...> both{std::tuple_cat(front.values, back.values), {}};
  std::copy(back.names.begin(), back.names.end(),
            std::copy(front.names.begin(), front.names.end(), both.names.begin()));
  return both;
}
#define FIELDS(LIST, ...) \
  auto LIST() { return ::softnpu::fields(#__VA_ARGS__, __VA_ARGS__); }

// "const aclTensor* x, double eps"; types alone where there are no names.
SOFTNPU_CXX std::string declared(const std::vector<const char*>& types,
                                 const std::vector<const char*>& names);

template <class Op, class... Values>
struct Phase1 {
  static int run(typename Argument<Values>::Raw... raw, uint64_t* workspace,
                 aclOpExecutor** executor) {
    static constinit Call call{Op::name, "GetWorkspaceSize"};
    if (const int injected = call.enter()) return injected;
    try {
      int index = 0;
      (refuse_dead(raw, ++index), ...);
      Builder builder(Op::name, Op::checked);
      // Braces: converted from left to right, so that the trace lists arguments in order.
      std::tuple<Values...> values{Argument<Values>::take(builder, raw)...};
      return finish(builder, Op::prepared(std::move(values)), workspace, executor);
    } catch (...) {
      return report_exception(Op::name);
    }
  }
  static std::string signature() { return declared({Argument<Values>::c_type...}, Op::names()); }
};

template <class Op>
struct Positional {  // its kernel is a lambda of the arguments
  static constexpr bool checked = false;
  static std::vector<const char*> names() { return {}; }
  template <class Values>
  static Prepared prepared(Values values) {
    return {[values = std::move(values)] { std::apply(Op::kernel, values); }};
  }
};
template <class Op, class Lambda, class... Parameters>
Phase1<Op, std::decay_t<Parameters>...> phase1(void (Lambda::*)(Parameters...) const);

template <class Op, class Arguments>
struct Structured {  // its check and its kernel are functions of a struct, maybe a `failed` too
  static constexpr bool checked = true;
  static std::vector<const char*> names() {
    Arguments arguments{};
    const auto names = Op::list(arguments).names;
    return {names.begin(), names.end()};
  }
  template <class... Values>
  static Prepared prepared(std::tuple<Values...> values) {
    Arguments arguments{};
    const auto fill = [&](Values&... field) {
      std::apply([&](Values&... v) { (renew(field, v), ...); }, values);
    };
    std::apply(fill, Op::list(arguments).values);
    std::invoke(Op::check, arguments);
    if constexpr (requires { arguments.failed(std::string()); }) {
      return {[arguments] { std::invoke(Op::kernel, arguments); },
              [arguments](const std::string& why) { arguments.failed(why); }};
    } else {
      return {[arguments = std::move(arguments)] { std::invoke(Op::kernel, arguments); }};
    }
  }

 private:
  template <class Value>
  static void renew(Value& field,
                    Value& value) {  // not assigned: assigning to an Out stores into its tensor
    std::destroy_at(&field);
    std::construct_at(&field, std::move(value));
  }
};
template <class Op, size_t parts, class... Values>
Phase1<Op, Values...> phase1(const Fields<parts, Values...>&);

using Unknown = int();  // the resolver picks the typed phase 1; the symbol itself has no type

struct Listed {  // for softnpu_signature
  const char* name;
  std::string (*signature)();
};
// What the linker gathers of all files of one library.
extern "C" [[gnu::visibility("hidden")]] const Listed* const __start_softnpu_operators[];
extern "C" [[gnu::visibility("hidden")]] const Listed* const __stop_softnpu_operators[];
SOFTNPU_CXX const char* signature_in(const Listed* const* first, const Listed* const* last,
                                     const char* name);

// The arguments of an operator's phase 1 in C, before workspaceSize and executor: types, and names
// where it has any; nullptr: this library has no such operator. "aclTensor*" without const is
// written. Every library of operators has this function, and answers for itself alone.
SOFTNPU_C [[gnu::used]] inline const char* softnpu_signature(const char* name) {
  return signature_in(__start_softnpu_operators, __stop_softnpu_operators, name);
}

#define SOFTNPU_SYMBOLS(NAME, SHAPE)                                                           \
  using Typed_##NAME = decltype(phase1<Op_##NAME>(SHAPE));                                     \
  static constinit const Listed listed_##NAME{#NAME, &Typed_##NAME::signature};                \
  [[gnu::section("softnpu_operators"),                                                         \
    gnu::used]] static constinit const Listed* const entry_##NAME = &listed_##NAME;            \
  extern "C" [[gnu::visibility("hidden")]] Unknown* softnpu_phase1_##NAME() {                  \
    return reinterpret_cast<Unknown*>(reinterpret_cast<void*>(&Typed_##NAME::run));            \
  }                                                                                            \
  SOFTNPU_C int NAME##GetWorkspaceSize() __attribute__((ifunc("softnpu_phase1_" #NAME)));      \
  SOFTNPU_C int NAME(void* workspace, uint64_t size, aclOpExecutor* executor, Handle stream) { \
    static constinit Call call{#NAME};                                                         \
    return phase2(call, workspace, size, executor, stream);                                    \
  }

#define OP(NAME, ...)                           \
  namespace {                                   \
  struct Op_##NAME : Positional<Op_##NAME> {    \
    static constexpr const char* name = #NAME;  \
    static constexpr auto kernel = __VA_ARGS__; \
  };                                            \
  }                                             \
  SOFTNPU_SYMBOLS(NAME, &decltype(Op_##NAME::kernel)::operator())

// LIST: which of the struct's lists; CHECK, a function of the struct, runs in phase 1 and throws
// Fault(161002, ...).
#define NAMED(NAME, ARGUMENTS, LIST, CHECK, KERNEL)                     \
  namespace {                                                           \
  struct Op_##NAME : Structured<Op_##NAME, ARGUMENTS> {                 \
    static constexpr const char* name = #NAME;                          \
    static constexpr auto check = &ARGUMENTS::CHECK;                    \
    static constexpr auto kernel = &ARGUMENTS::KERNEL;                  \
    static auto list(ARGUMENTS& arguments) { return arguments.LIST(); } \
  };                                                                    \
  }                                                                     \
  SOFTNPU_SYMBOLS(NAME, Op_##NAME::list(std::declval<ARGUMENTS&>()))

}  // namespace softnpu
