// Blocks of channels in e4m3 or e2m1 under power-of-two scales (spec/v4.md 6.1, 6.2).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

enum class BlockFormat { e4m3, e2m1 };

// Codes and E8M0 scales of consecutive blocks of `block_size` channels; the last may be short.
// codes: adjacent rows, one e4m3 code a byte or two e2m1 codes, the even channel in the low nibble;
// scales: adjacent rows, one byte a block.
struct Quantise {
  BlockFormat format;
  DType dtype;
  const void* x;
  RowLayout x_rows;
  int64_t block_size;
  uint8_t* codes;
  uint8_t* scales;
};

// The values of those codes for the first `channels` channels, the others copied. y: adjacent rows
// of x's dtype.
struct RoundTrip {
  BlockFormat format;
  DType dtype;
  const void* x;
  RowLayout x_rows;
  int64_t block_size;
  int64_t channels;
  void* y;
};

// Blocks of a row of `channels`.
inline int64_t block_count(int64_t channels, int64_t block_size) {
  return channels == 0 ? 0 : (channels - 1) / block_size + 1;
}

void quantise(const Quantise& call, Isa isa);
void round_trip(const RoundTrip& call, Isa isa);

}  // namespace dsv4::cpu
