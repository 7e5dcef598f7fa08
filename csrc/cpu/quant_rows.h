// Rows of blocks in e4m3 or e2m1, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

// Where a block of channels begins, and how many it has.
struct Block {
  int64_t first;
  int64_t width;

  Block(int64_t number, int64_t channels, int64_t size)
      : first(number * size), width(channels - first < size ? channels - first : size) {}
};

// Codes of channels [first, first + width) into the row's bytes.
template <class X>
uint8_t encode_block(E4m3, const X* x, int64_t first, int64_t width, uint8_t* codes) {
  return quantise_block<E4m3>(x + first, width, codes + first);
}

// Into its nibbles, in rising order of channels.
template <class X>
uint8_t encode_block(E2m1, const X* x, int64_t first, int64_t width, uint8_t* packed) {
  const int byte = block_scale<E2m1>(x + first, width);
  const Vec inverse = inverse_scale(byte == kNanScale ? 127 : byte);
  uint8_t code[Vec::lanes] = {};
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    const int64_t count = width - i < Vec::lanes ? width - i : Vec::lanes;
    if (byte != kNanScale) {
      encode<E2m1>(load_first(x + first + i, count) * inverse).store(code);
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t channel = first + i + k;
      uint8_t& both = packed[channel / 2];
      both = static_cast<uint8_t>(channel % 2 == 0 ? code[k] : both | code[k] << 4);
    }
  }
  return static_cast<uint8_t>(byte);
}

template <class Format>
struct Quantiser {
  template <class X>
  static void rows(const dsv4::cpu::Quantise& call, int64_t begin, int64_t end) {
    const int64_t width = call.x_rows.width();
    const int64_t blocks = dsv4::cpu::block_count(width, call.block_size);
    for (int64_t row = begin; row < end; ++row) {
      const X* x = static_cast<const X*>(call.x) + call.x_rows.offset(row);
      uint8_t* codes = call.codes + row * (width / Format::codes_in_a_byte);
      for (int64_t b = 0; b < blocks; ++b) {
        const Block block(b, width, call.block_size);
        call.scales[row * blocks + b] = encode_block(Format(), x, block.first, block.width, codes);
      }
    }
  }
};

void quantise_rows(const dsv4::cpu::Quantise& call, int64_t begin, int64_t end) {
  if (call.format == dsv4::cpu::BlockFormat::e4m3) {
    DSV4_FOR_DTYPE(call.dtype, Quantiser<E4m3>::template rows, call, begin, end);
  } else {
    DSV4_FOR_DTYPE(call.dtype, Quantiser<E2m1>::template rows, call, begin, end);
  }
}

template <class Format, class X>
void round_trip_block(const X* x, int64_t width, X* y) {
  const int byte = block_scale<Format>(x, width);
  const bool finite = byte != kNanScale;
  // A NaN scale makes every value NaN.
  const Vec scale = finite ? scale_value(byte) : Vec::broadcast(__builtin_nanf(""));
  const Vec inverse = inverse_scale(finite ? byte : 127);
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) {
    (round_to_format<Format>(Vec::load(x + i) * inverse) * scale).store(y + i);
  }
  const int64_t rest = width - i;
  store_first(round_to_format<Format>(load_first(x + i, rest) * inverse) * scale, y + i, rest);
}

template <class Format, class X>
void round_trip_row(const dsv4::cpu::RoundTrip& call, int64_t row) {
  const int64_t width = call.x_rows.width();
  const X* x = static_cast<const X*>(call.x) + call.x_rows.offset(row);
  X* y = static_cast<X*>(call.y) + row * width;
  const int64_t blocks = dsv4::cpu::block_count(call.channels, call.block_size);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block(b, call.channels, call.block_size);
    round_trip_block<Format>(x + block.first, block.width, y + block.first);
  }
  if (call.channels < width) {
    __builtin_memcpy(y + call.channels, x + call.channels,
                     static_cast<size_t>(width - call.channels) * sizeof(X));
  }
}

template <class X>
void round_trip_typed(const dsv4::cpu::RoundTrip& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (call.format == dsv4::cpu::BlockFormat::e4m3) {
      round_trip_row<E4m3, X>(call, row);
    } else {
      round_trip_row<E2m1, X>(call, row);
    }
  }
}

void round_trip_rows(const dsv4::cpu::RoundTrip& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, round_trip_typed, call, begin, end);
}
