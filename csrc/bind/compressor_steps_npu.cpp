#include "compressor_steps_npu.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/softmax.h>

#include <limits>

#include "matmul_npu.h"
#include "npu/matmul.h"
#include "paged_npu.h"

namespace dsv4::bind {
namespace {

// Blocks and rows in a paged state: int64 of one shape each.
struct Places {
  at::Tensor block, row;

  // Of positions [M, n] of the sequences `owner` [M, 1]; a table with fewer columns is a ring.
  Places(const at::Tensor& table, const at::Tensor& owner, const at::Tensor& positions,
         int64_t block_size)
      : block(at::div(positions, block_size, "floor").remainder(table.size(1))),
        row(positions.remainder(block_size)) {
    const at::Tensor flat = owner.mul(table.size(1)).add(block);
    block = table.flatten().index_select(0, flat.flatten()).to(at::kLong).view(positions.sizes());
  }
};

// For every row its sequence, by the ends of sequences in rows: int64 [rows], R behind the last;
// without a search, which the chip has not.
at::Tensor sequence_of(const at::Tensor& rows, const at::Tensor& ends) {
  return rows.unsqueeze(1).ge(ends).sum(1);
}

// What a step's lengths and tables say of tokens and entries, in the order of `indices`.
struct Indices {
  at::Tensor written_block, written_row, phase;  // of tokens [T]
  at::Tensor read_block, read_row, absent;       // of entries [M, c * r], absent [M, c * r, 1]
};

struct Lengths {
  const at::Tensor &table, &starts, &ends;
  int64_t tokens, rows, ratio, groups, block_size;

  Indices indices() const {
    const std::vector<int64_t> numbers = {tokens, rows, ratio, groups, block_size};
    const auto make = [this] { return made(); };
    const Tensors all =
        Step::once({"places of a compressor", {table, starts, ends}, numbers}, make);
    return {all.at(0), all.at(1), all.at(2), all.at(3), all.at(4), all.at(5)};
  }

 private:
  Tensors made() const {
    const int64_t last = ends.size(0) - 1;
    const at::Tensor offsets = starts.to(at::kLong), lengths = ends.to(at::kLong);
    const at::Tensor before = lengths.sub(offsets.diff());
    const at::Tensor token = at::arange(tokens, lengths.options());
    const at::Tensor owner = sequence_of(token, offsets.slice(0, 1)).clamp_max(last);
    const at::Tensor first = before.sub(offsets.slice(0, 0, last + 1));
    const at::Tensor position = token.add(first.index_select(0, owner));
    const Places written(table, owner, position, block_size);

    const at::Tensor closed = at::div(lengths, ratio, "floor");
    const at::Tensor after = closed.sub(at::div(before, ratio, "floor")).cumsum(0);
    const at::Tensor entry = at::arange(rows, lengths.options());
    const at::Tensor sequence = sequence_of(entry, after);
    const at::Tensor of_entry = sequence.clamp_max(last);
    // A sequence's entries end with its block `closed - 1` in row `after - 1`.
    const at::Tensor block = closed.sub(after).index_select(0, of_entry).add(entry);
    const at::Tensor back = at::arange(-groups * ratio, 0, lengths.options());
    const at::Tensor pooled = block.add(1).mul(ratio).unsqueeze(1).add(back);
    const at::Tensor absent = pooled.lt(0).logical_or(sequence.gt(last).unsqueeze(1));
    const Places read(table, of_entry.unsqueeze(1), pooled.clamp_min(0), block_size);
    return {written.block, written.row, position.remainder(ratio),
            read.block,    read.row,    absent.unsqueeze(-1)};
  }
};

}  // namespace

WhyNot PoolInSteps::why_not(const Context&, const at::Tensor& x, const at::Tensor& wkv,
                            const at::Tensor& wgate, const at::Tensor&, const at::Tensor&,
                            const at::Tensor& table, const at::Tensor&, const at::Tensor&, int64_t,
                            int64_t) {
  return first(not_of("x", x, kFloats), not_of("wkv", wkv, {x.scalar_type()}),
               not_of("wgate", wgate, {x.scalar_type()}), empty("x", x), empty("wkv", wkv),
               empty("state_block_table", table));
}

at::Tensor PoolInSteps::run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                            const at::Tensor& ape, const at::Tensor& state, const at::Tensor& table,
                            const at::Tensor& starts, const at::Tensor& ends, int64_t,
                            int64_t head_dim) {
  const int64_t tokens = x.size(0), ratio = ape.size(0), groups = wkv.size(0) / head_dim;
  const int64_t rows = std::min(tokens, tokens / ratio + ends.size(0));
  const Indices places =
      Lengths{table, starts, ends, tokens, rows, ratio, groups, state.size(1)}.indices();
  const NpuCall call("compress_pool", x);
  const at::Tensor hidden = x.contiguous();
  const at::Tensor scores = single_product(call, hidden, wgate);
  const at::Tensor own = at::cat(
      {single_product(call, hidden, wkv), scores.add_(ape.index_select(0, places.phase))}, 1);
  at::Tensor(state).index_put_({places.written_block, places.written_row}, own);

  // [M, c, r, 2, c, hd]: block g of the c blocks uses channel range g of values and of scores.
  const at::Tensor all = state.index({places.read_block, places.read_row})
                             .view({rows, groups, ratio, 2, groups, head_dim});
  const at::Tensor ranges = all.diagonal(0, 1, 4).permute({2, 0, 4, 1, 3}).flatten(2, 3);
  constexpr double lowest = std::numeric_limits<float>::lowest();
  const at::Tensor weights = ranges.select(0, 1).masked_fill(places.absent, lowest).softmax(1);
  return ranges.select(0, 0).masked_fill(places.absent, 0).mul(weights).sum(1).to(x.scalar_type());
}

}  // namespace dsv4::bind
