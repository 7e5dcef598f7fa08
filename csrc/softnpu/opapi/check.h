// Argument checks of fused operators: a table for each operator, row by row as CANN documents it.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "op.h"
#include "softnpu/acl/config.h"

namespace softnpu {

// Where a row comes from. kReading: our own reading of an unclear or missing sentence, not confirmed on hardware.
enum class Source { kDocument, kReading };

enum Where : unsigned { kOnA2 = 1, kOnA3 = 2, kOnA5 = 4, kEverywhere = 7 };

struct Rule {
  const char* argument;
  bool required;
  std::vector<at::ScalarType> dtypes;
  int64_t lowest_rank, highest_rank;
  Source source;
};

inline constexpr auto kF32 = at::kFloat;
inline constexpr auto kF16 = at::kHalf;
inline constexpr auto kBF16 = at::kBFloat16;

[[noreturn]] void refuse(const std::string& argument, const std::string& found, const std::string& expected);
void require(bool condition, const char* argument, const std::string& found, const char* expected);
bool here(unsigned where);                // on one of these chips
bool cann_from(int major, int minor);     // the CANN version that torch_npu is told is this one or later
void require_generation(unsigned where);  // refuses the operator on a chip that does not have it
void check_table(const std::vector<Rule>& rules, std::initializer_list<at::Tensor> tensors);
std::string show(In x);

}  // namespace softnpu
