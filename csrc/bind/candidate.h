// Makes a candidate of a function with an operator's own parameters and of a predicate with the
// same ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "registry.h"

namespace dsv4::bind {

using Optional = std::optional<at::Tensor>;

// The first reason there is.
template <class... More>
WhyNot first(WhyNot reason, More... more) {
  if constexpr (sizeof...(more) == 0) {
    return reason;
  } else {
    return reason ? reason : first(more...);
  }
}

template <class T>
decltype(auto) unpack(const c10::IValue& value) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    return value.toTensor();
  } else {
    return value.to<T>();
  }
}

template <class... Values>
void push(torch::jit::Stack& stack, std::tuple<Values...> results) {
  std::apply([&](auto&&... value) { (stack.emplace_back(std::move(value)), ...); },
             std::move(results));
}

inline void push(torch::jit::Stack& stack, at::Tensor result) {
  stack.emplace_back(std::move(result));
}

template <auto function>
struct TypedFunction;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct TypedFunction<function> {
  static constexpr size_t arity = sizeof...(Parameters);

  static void run(torch::jit::Stack& stack) {
    const Arguments arguments = torch::jit::last(stack, arity);
    if constexpr (std::is_void_v<Result>) {
      call(arguments, std::index_sequence_for<Parameters...>{});
      torch::jit::drop(stack, arity);
    } else {
      Result result = call(arguments, std::index_sequence_for<Parameters...>{});
      torch::jit::drop(stack, arity);
      push(stack, std::move(result));
    }
  }

 private:
  template <size_t... i>
  static Result call(Arguments arguments, std::index_sequence<i...>) {
    return function(unpack<std::decay_t<Parameters>>(arguments[i])...);
  }
};

template <auto predicate>
struct TypedPredicate;

template <class... Parameters, WhyNot (*predicate)(const Context&, Parameters...)>
struct TypedPredicate<predicate> {
  static WhyNot why_not(const Context& context, Arguments arguments) {
    return ask(context, arguments, std::index_sequence_for<Parameters...>{});
  }

 private:
  template <size_t... i>
  static WhyNot ask(const Context& context, Arguments arguments, std::index_sequence<i...>) {
    return predicate(context, unpack<std::decay_t<Parameters>>(arguments[i])...);
  }
};

// One CPU candidate for every instruction set: its kernel copies bytes, or makes codes one by one.
template <auto predicate, auto function>
struct PortableRegistration {
  explicit PortableRegistration(const std::string& op) {
    add_candidate(op, c10::DeviceType::CPU, op + "/" + isa_name(Isa::portable),
                  &TypedPredicate<predicate>::why_not, &TypedFunction<function>::run);
  }
};

// One CPU candidate per instruction set of a kernel `template <Isa> Result
// function(Parameters...)`, best first. `Kernel` has `template <Isa isa> static Result run(...)`
// and `static WhyNot why_not(const Context&, ...)`.
template <class Kernel>
struct IsaRegistration {
  explicit IsaRegistration(const std::string& op) {
#if defined(__x86_64__)
    add<Isa::avx512>(op);
    add<Isa::avx2>(op);
#endif
    add<Isa::portable>(op);
  }

 private:
  template <Isa isa>
  static void add(const std::string& op) {
    const auto why_not = [](const Context& context, Arguments arguments) -> WhyNot {
      if (context.isa < isa) {
        return std::string("needs ") + isa_name(isa) + ", and this process uses " +
               isa_name(context.isa);
      }
      return TypedPredicate<&Kernel::why_not>::why_not(context, arguments);
    };
    add_candidate(op, c10::DeviceType::CPU, op + "/" + isa_name(isa), why_not,
                  &TypedFunction<&Kernel::template run<isa>>::run);
  }
};

}  // namespace dsv4::bind
