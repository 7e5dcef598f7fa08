// Matrices in rows and columns or in the NZ layout, and the cast between the two.
// hicann ops-math: conversion/npu_format_cast/docs/aclnnNpuFormatCast.md
#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "fused_quant.h"

namespace softnpu {
namespace {

bool is_int4(at::ScalarType dtype) { return dtype == kI4; }
bool is_4bit(at::ScalarType dtype) { return is_int4(dtype) || dtype == kE2M1; }

bool is_transposed(const aclTensor& raw) {
  const size_t n = raw.sizes.size();
  if (n < 2 || (raw.strides[n - 1] == 1 && raw.strides[n - 2] == raw.sizes[n - 1])) return false;
  return raw.strides[n - 2] == 1 && raw.strides[n - 1] == raw.sizes[n - 2];
}

// All of its values, in order, or with the last two dimensions exchanged.
bool is_whole(const aclTensor& raw) {
  const size_t n = raw.sizes.size();
  const bool turned = is_transposed(raw);
  int64_t step = 1;
  for (size_t i = n; i-- > 0;) {
    const size_t axis = turned && i + 2 >= n ? 2 * n - 3 - i : i;
    if (raw.sizes[axis] != 1 && raw.strides[axis] != step) return false;
    step *= raw.sizes[axis];
  }
  return raw.offset == 0;
}

// Behind the batch: [column tiles, row tiles, 16, C0].
void append_tiles(std::vector<int64_t>& batch, int64_t rows, int64_t columns, int64_t width) {
  batch.insert(batch.end(), {ceil_div(columns, width), ceil_div(rows, 16), 16, width});
}

// [batch..., column tiles, row tiles, 16, C0] of units (bytes for 4-bit types)
Matrix take_tiles(Builder& b, const aclTensor& raw, Matrix result, int64_t width) {
  result.nz = true;
  result.transposed = is_transposed(raw);
  const size_t rank = raw.sizes.size();
  if (rank < 2 || !is_whole(raw))
    throw Fault(kNnParameter, "part of a tensor in the NZ format is not emulated");
  std::vector<int64_t> tiles(raw.sizes.begin(), raw.sizes.end() - 2);
  if (rank == 5) {  // the tiles themselves are the sizes
    tiles = raw.sizes;
    result.sizes = {raw.sizes[0], raw.sizes[2] * 16, raw.sizes[1] * raw.sizes[4]};
    result.transposed = false;
  } else {
    const int64_t rows = raw.sizes[rank - (result.transposed ? 1 : 2)];
    const int64_t columns = raw.sizes[rank - (result.transposed ? 2 : 1)];
    append_tiles(tiles, rows, columns, width);
  }
  int64_t values = 1;
  for (const int64_t size : tiles) values *= size;
  if (is_4bit(result.dtype)) tiles.back() /= 2;
  void* const data = b.alias(raw.data, static_cast<size_t>(values) * dtype_bits(raw.dtype) / 8);
  result.stored = at::from_blob(
      data, tiles, at::TensorOptions().dtype(is_4bit(result.dtype) ? at::kByte : result.dtype));
  return result;
}

}  // namespace

Matrix take_matrix(Builder& b, const aclTensor* raw) {
  if (!raw) return {};
  Matrix result;
  result.dtype = scalar_type(raw->dtype);
  result.sizes = raw->sizes;
  if (const int64_t width = tile_width(*raw)) {
    if (tracing()) b.note(describe(*raw) + " NZ");
    return take_tiles(b, *raw, result, width);
  }
  result.transposed = is_transposed(*raw);
  aclTensor plain = *raw;
  if (result.transposed) {
    std::swap(plain.sizes.end()[-1], plain.sizes.end()[-2]);
    std::swap(plain.strides.end()[-1], plain.strides.end()[-2]);
  }
  result.stored = b.tensor(&plain);
  if (is_4bit(result.dtype)) result.stored = result.stored.view(at::kByte);
  return result;
}

at::Tensor Matrix::read() const {
  at::Tensor result = stored;
  if (is_int4(dtype))
    result = int4_values(stored.view(kI4)).to(kI8);
  else if (is_4bit(dtype))
    result = fp4_values(stored.view(kE2M1)).to(kF32);
  if (nz) {
    const auto batch = result.sizes().slice(0, static_cast<size_t>(result.dim()) - 4).vec();
    std::vector<int64_t> flat = batch;
    flat.insert(flat.end(), {result.size(-3) * 16, result.size(-4) * result.size(-1)});
    result = result.movedim({-3, -2}, {-4, -3}).reshape(flat);
    result =
        result.narrow(-2, 0, size(transposed ? -1 : -2)).narrow(-1, 0, size(transposed ? -2 : -1));
  }
  return transposed ? result.transpose(-1, -2) : result;
}

Matrix Matrix::operator[](int64_t i) const {
  Matrix result = *this;
  result.sizes.erase(result.sizes.begin());
  result.stored = stored[i];
  return result;
}

Matrix Matrix::opened(at::ScalarType outer, at::ScalarType inner) const {
  if (dtype != outer) return *this;
  Matrix result = *this;
  result.dtype = inner;
  result.sizes.end()[transposed ? -2 : -1] *= 8;
  result.stored = stored.view(at::kByte);
  return result;
}

std::string show(Matrix_ x) {
  if (!x.defined()) return "nothing";
  std::ostringstream out;
  out << x.dtype << " " << at::IntArrayRef(x.sizes) << (x.nz ? " in the NZ format" : "");
  return out.str();
}

namespace {

struct Storage {  // one side of a cast
  aclTensor raw;
  char* data = nullptr;
};

Tiles tiles_of(const aclTensor& tiled) {
  const size_t bits = dtype_bits(tiled.dtype), n = tiled.sizes.size();
  const int64_t unit_values = bits < 8 ? 2 : 1;
  Tiles result{1, tiled.sizes[n - 2], tiled.sizes[n - 1] / unit_values,
               tiled.storage.back() / unit_values, std::max<size_t>(bits, 8) / 8};
  for (size_t i = 0; i + 2 < n; ++i) result.batch *= tiled.sizes[i];
  return result;
}

}  // namespace

template <>
struct Argument<Storage> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "const aclTensor*";
  static Storage take(Builder& b, Raw raw) {
    if (!raw) throw Fault(kNnNullptr, "a tensor is null");
    if (tracing()) b.note(describe(*raw));
    if (raw->sizes.size() < 2) refuse("srcTensor", describe(*raw), "2 to 6 dimensions");
    const bool tiled = tile_width(*raw) != 0;
    aclTensor whole = *raw;
    if (!tiled) whole.storage = {1};
    const size_t bytes = tiles_of(whole).bytes(tiled);
    return {*raw, static_cast<char*>(b.alias(raw->data, bytes))};
  }
};

namespace {

struct Target : Storage {};

}  // namespace

template <>
struct Argument<Target> {
  using Raw = const aclTensor*;
  static constexpr const char* c_type = "aclTensor*";
  static Target take(Builder& b, Raw raw) { return {Argument<Storage>::take(b, raw)}; }
};

namespace {

struct FormatCast {
  Storage from;
  Target to;
  FIELDS(all, from, to)

  void check() const {
    require(!tile_width(from.raw) || !tile_width(to.raw), "dstTensor",
            "format " + std::to_string(to.raw.format), "rows and columns on one side");
    require(from.raw.dtype == to.raw.dtype && from.raw.sizes == to.raw.sizes, "dstTensor",
            describe(to.raw), "dtype and shape of srcTensor");
  }

  void run() const {
    const bool to_tiles = tile_width(to.raw) != 0;
    if (!to_tiles &&
        !tile_width(
            from.raw)) {  // torch_npu's allow_internal_format is off: a plain copy (our reading)
      aclTensor plain = to.raw;
      plain.storage = {1};
      std::memcpy(to.data, from.data, tiles_of(plain).bytes(false));
      return;
    }
    retile(tiles_of(to_tiles ? to.raw : from.raw), to_tiles ? to.data : from.data,
           to_tiles ? from.data : to.data, to_tiles);
  }
};

}  // namespace

NAMED(aclnnNpuFormatCast, FormatCast, all, check, run)

}  // namespace softnpu

using namespace softnpu;

// Says how large the result of the cast is; the caller frees `shape` with delete[].
SOFTNPU_C int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format,
                                                       int basis, int64_t** shape, uint64_t* rank,
                                                       int* actual) try {
  SOFTNPU_ENTER();
  refuse_dead(source, 1);
  std::vector<int64_t> sizes = source->sizes;
  if (sizes.size() < 2 || sizes.size() > 6)
    refuse("srcTensor", describe(*source), "2 to 6 dimensions");
  if (format != kFormatNz && format != kFormatNd)
    refuse("dstFormat", std::to_string(format), "29 (NZ) or 2 (ND)");
  *actual = format;
  if (format == kFormatNz) {
    const size_t bits = dtype_bits(source->dtype),
                 basis_bits = dtype_bits(basis < 0 ? source->dtype : basis);
    const auto width = static_cast<int64_t>(256 / basis_bits);
    // A2 and A3 answer NZ whatever the basis is: its width stands in the storage's last dimension.
    if (basis_bits != bits && on_a5())
      *actual = width == 16 ? kFormatNzC0Is16 : width == 32 ? kFormatNzC0Is32 : kFormatNz;
    const int64_t columns = sizes.back(), rows = sizes.end()[-2];
    sizes.resize(sizes.size() - 2);
    append_tiles(sizes, rows, columns, width);
  }
  *rank = sizes.size();
  *shape = new int64_t[sizes.size()];
  std::copy(sizes.begin(), sizes.end(), *shape);
  return kOk;
} catch (const Fault& fault) {
  return fail(fault);
}
