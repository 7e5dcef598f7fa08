// Errors that the binding layer turns into the Python classes of dsv4_backend.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace dsv4 {

// An operator argument has a wrong rank, shape, dtype, device or value.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;

  // The message of every argument error, in Python's words: dsv4_backend.errors.argument_error.
  ArgumentError(const std::string& op, const std::string& argument, const std::string& found,
                const std::string& expected)
      : std::invalid_argument("dsv4::" + op + ": argument '" + argument + "': found " + found +
                              ", expected " + expected) {}
};

// No implementation runs these arguments on this device under the active policy.
struct UnsupportedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An Ascend operator refused a call that our checks had let through, or CANN lacks what a call
// needs.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace dsv4
