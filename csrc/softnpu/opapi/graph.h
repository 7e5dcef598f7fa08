// How an operator of the graph-operator path is written, of those that torch_npu still sends there
// on A2 and A3: GRAPH_OP(LpNormReduceV2, [](const GraphArguments& a) { a.out(0) = ...; })
#pragma once

#include "op.h"
#include "softnpu/acl/graph_operator.h"

namespace softnpu {

struct GraphArguments {
  std::vector<at::Tensor> inputs;  // undefined where an optional one is absent
  std::vector<Out> outputs;
  Attributes attributes;

  In in(size_t i) const { return inputs.at(i); }
  at::Tensor optional(size_t i) const { return i < inputs.size() ? inputs[i] : at::Tensor(); }
  const Out& out(size_t i) const { return outputs.at(i); }
  template <class T>
  const T& attribute(const char* name) const {
    return std::get<T>(attributes.at(name));
  }
  bool flag(const char* name) const { return attribute<int64_t>(name) != 0; }
};

// Sums are fp32.
inline at::Tensor wide(In x) { return x.defined() && x.is_floating_point() ? x.to(at::kFloat) : x; }

std::vector<int64_t> integers(In values);  // sizes, axes and the like that came as a tensor

int launch_graph_operator(const GraphCall& call, void (*kernel)(const GraphArguments&));

#define GRAPH_OP(NAME, ...)                                                                        \
  namespace {                                                                                      \
  const bool registered_##NAME =                                                                   \
      (register_graph_operator(                                                                    \
           #NAME, [](const GraphCall& call) { return launch_graph_operator(call, __VA_ARGS__); }), \
       true);                                                                                      \
  }

}  // namespace softnpu
