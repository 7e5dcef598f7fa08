// The k best scored entries of a stream, exactly: larger scores first, of equal ones the smaller
// index (spec/v4.md 4.5, 15.1).
#pragma once

#include <bit>
#include <cstdint>

namespace dsv4::cpu {

// A score and an index in one number that is larger for the better entry. -0 is 0.
inline uint64_t ranked(float score, int64_t index) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t order = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  return uint64_t{order} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

inline float score_of(uint64_t entry) {
  const auto order = static_cast<uint32_t>(entry >> 32);
  return std::bit_cast<float>(order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

inline int32_t index_of(uint64_t entry) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry));
}

// Entries in no order, among them the k best of all that were offered. Whoever offers appends what
// exceeds the threshold, in ascending order of indices, and calls keep() before there are more than
// `capacity`.
struct BestEntries {
  uint64_t* entries;
  int64_t capacity;
  int64_t k;
  int64_t count = 0;
  bool bounded = false;  // whether k entries are at least the threshold
  float threshold = 0;
  bool undefined = false;  // whether a NaN was among what was offered

  // Drops all but the k best, and raises the threshold to the last of them.
  void keep();

  // The indices of the k best, best first or in any order, then -1.
  void indices(int32_t* to, bool in_order);
};

// Entries that a stream of `offered` needs room for.
int64_t best_entries_capacity(int64_t k, int64_t offered);

}  // namespace dsv4::cpu
