// The NZ layout, and the operator "Identity" of the graph-operator path, which torch_npu sends for
// npu_format_cast on A2 and A3.
#include "format.h"

#include <algorithm>
#include <cstring>

#include "device.h"
#include "memory.h"
#include "report.h"

namespace softnpu {

int64_t tile_width(const aclTensor& tensor) {
  switch (tensor.format) {
    case kFormatNz:  // torch_npu has 4-byte types tiled as 2-byte ones: the storage says so
      if (dtype_bits(tensor.dtype) == 32 && tensor.storage.size() >= 4 &&
          tensor.storage.back() == 16)
        return 16;
      return static_cast<int64_t>(256 / dtype_bits(tensor.dtype));
    case kFormatNzC0Is16:
      return 16;
    case kFormatNzC0Is32:
      return 32;
    case kFormatNzC0Is2:
      return 2;
    case kFormatNzC0Is4:
      return 4;
    case kFormatNzC0Is8:
      return 8;
    default:
      return 0;
  }
}

size_t Tiles::bytes(bool tiled) const {
  const int64_t values =
      tiled ? (rows + 15) / 16 * 16 * ((columns + width - 1) / width) * width : rows * columns;
  return static_cast<size_t>(batch * values) * unit;
}

void retile(const Tiles& t, char* tiled, char* plain, bool to_tiles) {
  const int64_t padded_rows = (t.rows + 15) / 16 * 16, steps = (t.columns + t.width - 1) / t.width;
  if (to_tiles) std::memset(tiled, 0, t.bytes(true));
  for (int64_t b = 0; b < t.batch; ++b)
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t row = 0; row < t.rows; ++row) {
        const size_t length =
            static_cast<size_t>(std::min(t.width, t.columns - step * t.width)) * t.unit;
        char* const in_tiles =
            tiled +
            static_cast<size_t>(((b * steps + step) * padded_rows + row) * t.width) * t.unit;
        char* const in_rows =
            plain + static_cast<size_t>((b * t.rows + row) * t.columns + step * t.width) * t.unit;
        std::memcpy(to_tiles ? in_tiles : in_rows, to_tiles ? in_rows : in_tiles, length);
      }
}

namespace {

int64_t product(const std::vector<int64_t>& sizes, size_t end) {
  int64_t result = 1;
  for (size_t i = 0; i < end; ++i) result *= sizes[i];
  return result;
}

}  // namespace

int format_cast(const GraphCall& call) {
  const Description &source = *call.inputs.at(0).description,
                    &target = *call.outputs.at(0).description;
  const Buffer &from = *call.inputs[0].buffer, &to = *call.outputs[0].buffer;
  const bool to_tiles = target.format == kFormatNz, same = !to_tiles && source.format != kFormatNz;
  const Description& tiled = to_tiles ? target : source;
  const Description& plain = to_tiles ? source : target;
  const size_t rank = plain.origin.size();
  if ((rank < 2 && !same) || (to_tiles && source.format == kFormatNz) ||
      dtype_bits(tiled.dtype) < 8 || source.dtype != target.dtype)
    return fail(kUnsupportedApi,
                "softnpu: Identity from format %d to %d with %zu dimensions is not emulated",
                source.format, target.format, rank);
  // With torch_npu's allow_internal_format off neither side is in tiles: a plain copy.
  const size_t unit = dtype_bits(tiled.dtype) / 8;
  const Tiles tiles = rank < 2 ? Tiles{1, 1, product(plain.origin, rank), 1, unit}
                               : Tiles{product(plain.origin, rank - 2), plain.origin[rank - 2],
                                       plain.origin[rank - 1], same ? 1 : tiled.dims.back(), unit};
  auto launch = std::make_shared<Launch>();
  launch->name = "Identity";
  launch->prepared_ns = now_ns();
  const auto reach = [&](const Buffer& buffer, size_t bytes) {
    if (!buffer.data) return static_cast<char*>(nullptr);  // a scalar that torch_npu gave no memory
    const Range range = resolve(buffer.data, bytes, current_device(), "Identity");
    launch->accesses.push_back({buffer.data, bytes, range.allocation});
    return static_cast<char*>(range.alias);
  };
  char* const in_tiles = reach(to_tiles ? to : from, tiles.bytes(!same));
  char* const in_rows = reach(to_tiles ? from : to, tiles.bytes(false));
  launch->kernel = [=] {
    if (!in_tiles || !in_rows) return;
    if (same)
      std::memcpy(in_rows, in_tiles, tiles.bytes(false));
    else
      retile(tiles, in_tiles, in_rows, to_tiles);
  };
  return enqueue(launch, call.stream);
}

}  // namespace softnpu
