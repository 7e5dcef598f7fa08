#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/zeros.h>

#include "norm_npu.h"
#include "npu/compressor.h"
#include "paged_npu.h"
#include "rotary_npu.h"

namespace dsv4::bind {
namespace {

// Tokens of each sequence before the call: int32 [R].
at::Tensor tokens_before(const at::Tensor& query_start_loc, const at::Tensor& seq_lens) {
  const int64_t sequences = seq_lens.size(0);
  return seq_lens.sub(query_start_loc.narrow(0, 1, sequences))
      .add_(query_start_loc.narrow(0, 0, sequences));
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

struct Compress {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& wkv,
                        const at::Tensor& wgate, const at::Tensor& ape, const at::Tensor& norm,
                        const at::Tensor&, const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor&, const at::Tensor&, int64_t max_seq_len, double) {
    const int64_t d = x.size(1), entry = norm.size(0), ratio = ape.size(0);
    const bool plain = state.is_contiguous() || (on_a5(context) && whole_pages(state));
    return first(
        not_of("x", x, kHalves), not_of("wkv", wkv, {x.scalar_type()}),
        not_of("wgate", wgate, {x.scalar_type()}), not_of("norm_weight", norm, kFloats),
        empty("x", x),
        unless(d >= 1024 && d <= 10240 && d % 512 == 0,
               "the chip takes 1024 to 10240 channels of x, a multiple of 512"),
        unless(entry == 128 || entry == 512, "the chip takes entries of 128 or 512 channels"),
        unless(ratio >= 2 && ratio <= 128 && (ratio & (ratio - 1)) == 0,
               "the chip takes ratios that are powers of two, 2 to 128"),
        unless(state.size(1) <= 1024, "the chip takes pages of at most 1024 rows"),
        unless(plain, "state_cache has gaps, and the chip takes none"),
        unless(table.size(1) * state.size(1) >= max_seq_len,
               "state_block_table may be a ring, and the chip takes absolute tables"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                        const at::Tensor& ape, const at::Tensor& norm, const at::Tensor& inv_freq,
                        const at::Tensor& state, const at::Tensor& table,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens, int64_t,
                        double eps) {
    const int64_t ratio = ape.size(0), entry = norm.size(0), tokens = x.size(0);
    const int64_t rows = std::min(tokens, tokens / ratio + seq_lens.size(0));
    const at::Tensor before = tokens_before(query_start_loc, seq_lens);
    const at::Tensor hidden = x.contiguous(), u = wkv.contiguous(), s = wgate.contiguous();
    at::Tensor pooled = at::zeros({rows, entry}, x.options());
    const NpuCall call("compress", x);
    call.launch(npu::Compressor{call.in(hidden),
                                call.in(u),
                                call.in(s),
                                call.out(state),
                                call.in(ape),
                                call.maybe(&table),
                                call.maybe(&query_start_loc),
                                {},
                                call.maybe(&before),
                                ratio,
                                wkv.size(0) / entry,
                                npu::Compressor::kAbsolute,
                                state.stride(0),
                                call.out(pooled)});
    if (rows == 0) {
      return pooled;
    }
    at::Tensor entries = normed(call, pooled, norm, eps);
    rotate(call, entries,
           Rotation(block_positions(before, seq_lens, rows, ratio), inv_freq, false));
    return entries;
  }
};

const NpuRegistration<Compress, npu::Compressor, npu::RmsNorm, npu::InplacePartialRotaryMul>
    compress("compress");

}  // namespace
}  // namespace dsv4::bind
