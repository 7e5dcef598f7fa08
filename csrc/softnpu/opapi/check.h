// Argument checks of fused operators: a table for each operator, row by row as CANN documents it.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "op.h"
#include "softnpu/acl/config.h"

namespace softnpu {

// Where a row comes from. kReading: our own reading of an unclear or missing sentence, not
// confirmed on hardware.
enum class Source { kDocument, kReading };
using enum Source;

enum Where : unsigned { kOnA2 = 1, kOnA3 = 2, kOnA5 = 4, kOnA2A3 = 3, kEverywhere = 7 };

using Types = std::vector<at::ScalarType>;

inline constexpr auto kNone = at::ScalarType::Undefined;  // the argument is null
inline constexpr auto kF32 = at::kFloat;
inline constexpr auto kF16 = at::kHalf;
inline constexpr auto kBF16 = at::kBFloat16;
inline constexpr auto kE4M3 = at::kFloat8_e4m3fn;
inline constexpr auto kE5M2 = at::kFloat8_e5m2;
inline constexpr auto kE8M0 = at::kFloat8_e8m0fnu;
inline constexpr auto kE2M1 = at::kFloat4_e2m1fn_x2;
inline constexpr auto kI32 = at::kInt;
inline constexpr auto kI8 = at::kChar;
inline constexpr auto kI4 = at::kBits4x2;
inline const Types kHalves = {kF16, kBF16}, kFloats = {kF16, kBF16, kF32}, kSingle = {kF32},
                   kInts = {kI32};

struct Rule {
  const char* argument;
  at::Tensor tensor;  // undefined: the argument is null
  bool required;
  Types dtypes;
  int64_t lowest_rank, highest_rank;
  Source source;
};

// What CANN's documents answer for a shape or a value that does not fit, where it is not 161002.
inline constexpr int kTilingRefuses = 561002, kShapeInferenceRefuses = 561103,
                     kWrongPlatform = 361001;

[[noreturn]] SOFTNPU_CXX void refuse(const std::string& argument, const std::string& found,
                                     const std::string& expected);
SOFTNPU_CXX void require(bool condition, const char* argument, const std::string& found,
                         const char* expected);
SOFTNPU_CXX bool here(unsigned where);  // on one of these chips
SOFTNPU_CXX bool cann_from(
    int major,
    int minor);  // the CANN version that torch_npu is told is this one or later
// Refuses the operator on a chip that does not have it.
SOFTNPU_CXX void require_generation(unsigned where, int code = kNnParameter);
SOFTNPU_CXX void check_table(const std::vector<Rule>& rules, int rank_code = kNnParameter);

// Runs checks whose refusals the document gives another code than 161002.
template <class Check>
void refusing_with(int code, const Check& check) {
  try {
    check();
  } catch (const Fault& fault) {
    throw Fault(fault.code == kNnParameter ? code : fault.code, fault.what());
  }
}
// For values that only the kernel can read: one outside of [first, end) is a fault that names the
// argument.
SOFTNPU_CXX void expect_values(In x, int64_t first, int64_t end, const char* argument);
SOFTNPU_CXX std::string show(In x);
SOFTNPU_CXX std::string show(const Types& types);
inline std::string text(int64_t value) { return std::to_string(value); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool on_a5() { return here(kOnA5); }

// Keeps the rows of a table that allow what was found for one argument; refuses it when none is
// left.
template <class Row>
void narrow(std::vector<const Row*>& rows, const char* argument, at::ScalarType found,
            const std::string& shown, Types Row::* column) {
  std::vector<const Row*> kept;
  Types expected;
  for (const Row* row : rows) {
    for (const auto dtype : row->*column) {
      if (dtype == found) kept.push_back(row);
      if (std::find(expected.begin(), expected.end(), dtype) == expected.end())
        expected.push_back(dtype);
    }
  }
  if (kept.empty()) refuse(argument, shown, show(expected) + " beside the arguments before it");
  rows = kept;
}

}  // namespace softnpu
