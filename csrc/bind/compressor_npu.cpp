#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "compressor_steps_npu.h"
#include "norm_npu.h"
#include "npu/compressor.h"
#include "npu/matmul.h"
#include "paged_npu.h"
#include "rotary_npu.h"

namespace dsv4::bind {
namespace {

// Tokens of each sequence before the call: int32 [R].
at::Tensor tokens_before(const at::Tensor& query_start_loc, const at::Tensor& seq_lens) {
  const int64_t sequences = seq_lens.size(0);
  const auto make = [&] {
    const at::Tensor before = seq_lens.sub(query_start_loc.narrow(0, 1, sequences));
    return Tensors{before.add_(query_start_loc.narrow(0, 0, sequences))};
  };
  return Step::once({"tokens before", {query_start_loc, seq_lens}, {}}, make).at(0);
}

// First position of the block of every entry that a call closes, as the chip packs them: sequences
// in order, blocks in order; 0 behind them. int64 [rows].
at::Tensor block_positions(const at::Tensor& before, const at::Tensor& seq_lens, int64_t rows,
                           int64_t ratio) {
  const at::Tensor first = at::div(before, ratio, "floor").to(at::kLong);
  const at::Tensor ends = at::div(seq_lens, ratio, "floor").to(at::kLong);
  const at::Tensor after = ends.sub(first).cumsum(0);  // entries up to each sequence's last
  const at::Tensor row = at::arange(rows, after.options());
  // For each row its sequence, R behind the last; without a search, which the chip has not.
  const at::Tensor sequence = row.unsqueeze(1).ge(after).sum(1);
  const at::Tensor owner = sequence.clamp_max(seq_lens.size(0) - 1);
  // A sequence's entries end with its block `ends - 1` in row `after - 1`.
  const at::Tensor block = ends.sub(after).index_select(0, owner).add_(row);
  return block.mul_(ratio).mul_(sequence.lt(seq_lens.size(0)));
}

// What the state and the projections of a call are.
struct Pool {
  const at::Tensor &x, &wkv, &wgate, &ape, &state, &table, &query_start_loc, &seq_lens;
  int64_t max_seq_len, head_dim;

  int64_t ratio() const { return ape.size(0); }
  int64_t rows() const {
    const int64_t tokens = x.size(0);
    return std::min(tokens, tokens / ratio() + seq_lens.size(0));
  }

  WhyNot why_not(const Context& context) const {
    const int64_t d = x.size(1), r = ratio();
    const bool plain = state.is_contiguous() || (on_a5(context) && whole_pages(state));
    return first(
        not_of("x", x, kHalves), not_of("wkv", wkv, {x.scalar_type()}),
        not_of("wgate", wgate, {x.scalar_type()}), empty("x", x),
        unless(d >= 1024 && d <= 10240 && d % 512 == 0,
               "the chip takes 1024 to 10240 channels of x, a multiple of 512"),
        unless(head_dim == 128 || head_dim == 512, "the chip takes entries of 128 or 512 channels"),
        unless(r >= 2 && r <= 128 && (r & (r - 1)) == 0,
               "the chip takes ratios that are powers of two, 2 to 128"),
        unless(state.size(1) <= 1024, "the chip takes pages of at most 1024 rows"),
        unless(plain, "state_cache has gaps, and the chip takes none"),
        unless(table.size(1) * state.size(1) >= max_seq_len,
               "state_block_table may be a ring, and the chip takes absolute tables"));
  }

  // Into pooled [rows, hd]: the chip leaves rows behind the last entry as they are.
  void run(const NpuCall& call, const at::Tensor& before, const at::Tensor& pooled) const {
    const at::Tensor hidden = x.contiguous(), u = wkv.contiguous(), s = wgate.contiguous();
    call.launch(npu::Compressor{call.in(hidden),
                                call.in(u),
                                call.in(s),
                                call.out(state),
                                call.in(ape),
                                call.maybe(&table),
                                call.maybe(&query_start_loc),
                                {},
                                call.maybe(&before),
                                ratio(),
                                wkv.size(0) / head_dim,
                                npu::Compressor::kAbsolute,
                                state.stride(0),
                                call.out(pooled)});
  }
};

struct CompressPool {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& wkv,
                        const at::Tensor& wgate, const at::Tensor& ape, const at::Tensor& state,
                        const at::Tensor& table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t max_seq_len, int64_t head_dim) {
    return Pool{x, wkv, wgate, ape, state, table, query_start_loc, seq_lens, max_seq_len, head_dim}
        .why_not(context);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                        const at::Tensor& ape, const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, int64_t head_dim) {
    const Pool pool{x,        wkv,         wgate,   ape, state, table, query_start_loc,
                    seq_lens, max_seq_len, head_dim};
    at::Tensor pooled = at::empty({pool.rows(), head_dim}, x.options());
    pool.run(NpuCall("compress_pool", x), tokens_before(query_start_loc, seq_lens), pooled);
    return pooled;
  }
};

struct Compress {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& wkv,
                        const at::Tensor& wgate, const at::Tensor& ape, const at::Tensor& norm,
                        const at::Tensor&, const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, double) {
    const Pool pool{x,        wkv,         wgate,       ape, state, table, query_start_loc,
                    seq_lens, max_seq_len, norm.size(0)};
    return first(pool.why_not(context), not_of("norm_weight", norm, kFloats));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                        const at::Tensor& ape, const at::Tensor& norm, const at::Tensor& inv_freq,
                        const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t max_seq_len, double eps) {
    const Pool pool{x,        wkv,         wgate,       ape, state, table, query_start_loc,
                    seq_lens, max_seq_len, norm.size(0)};
    const NpuCall call("compress", x);
    const at::Tensor before = tokens_before(query_start_loc, seq_lens);
    const at::Tensor pooled = at::zeros({pool.rows(), norm.size(0)}, x.options());
    pool.run(call, before, pooled);
    if (pool.rows() == 0) {
      return pooled;
    }
    at::Tensor entries = normed(call, pooled, norm, eps);
    rotate(call, entries,
           Rotation(block_positions(before, seq_lens, pool.rows(), pool.ratio()), inv_freq, false));
    return entries;
  }
};

const NpuRegistration<Compress, npu::Compressor, npu::RmsNorm, npu::InplacePartialRotaryMul>
    compress("compress");
const NpuRegistration<CompressPool, npu::Compressor> compress_pool("compress_pool",
                                                                   Kind::composite);
const NpuRegistration<PoolInSteps, npu::Matmul> compress_pool_in_steps("compress_pool",
                                                                       Kind::composite);

}  // namespace
}  // namespace dsv4::bind
