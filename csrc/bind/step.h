// What launchers derive from lengths and rotations of a step: made once while the step runs, and
// shared by its layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace dsv4::bind {

using Tensors = std::vector<at::Tensor>;

// A value by its name, the tensors it follows from and the numbers beside them.
struct Derived {
  std::string name;
  Tensors of;
  std::vector<int64_t> numbers;
};

// Around one step, on the thread that runs it. While it is open nobody writes the tensors that its
// values follow from.
class Step {
 public:
  // Have this value from the start, instead of what a launcher would make.
  void give(const Derived& what, Tensors values);

  // The value in the step that is open on this thread, made by the first who asks; made for every
  // caller where no step is open.
  static Tensors once(const Derived& what, const std::function<Tensors()>& make);

  // The value that was given or made; nothing where there is none.
  static const Tensors* find(const Derived& what);

  // The step that is open on this thread, nullptr for none; returns the one before.
  static Step* open(Step* step);

 private:
  // Name, addresses, then sizes, strides, stream and numbers.
  using Key = std::tuple<std::string, std::vector<const void*>, std::vector<int64_t>>;
  static Key key_of(const Derived& what);

  // Tensors are kept so that no other can take their addresses.
  std::map<Key, std::pair<Tensors, Tensors>> kept_;
};

}  // namespace dsv4::bind
