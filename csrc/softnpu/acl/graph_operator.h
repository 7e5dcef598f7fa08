// The graph-operator path: what one operator is given, and the table of those that are emulated.
#pragma once

#include <map>
#include <string>
#include <variant>
#include <vector>

#include "tensor.h"

namespace softnpu {

struct Description {
  int dtype, format;
  std::vector<int64_t> origin;  // sizes of the tensor
  std::vector<int64_t> dims;    // sizes of its storage
  bool on_host = false;         // small inputs (sizes, axes) lie in host memory
};

struct Buffer {
  void* data;
  size_t size;
};

using Attributes =
    std::map<std::string, std::variant<int64_t, double, std::string, std::vector<int64_t>>>;

struct GraphTensor {
  const Description* description;
  const Buffer* buffer;  // without data: an optional input that is absent
};

struct GraphCall {
  std::string type;
  std::vector<GraphTensor> inputs, outputs;
  const Attributes& attributes;
  Handle stream;
};

using GraphOperator = int (*)(const GraphCall&);  // enqueues the launch; may throw Fault

// libopapi's operators join the table when it is loaded.
SOFTNPU_CXX void register_graph_operator(const std::string& type, GraphOperator run);

}  // namespace softnpu
