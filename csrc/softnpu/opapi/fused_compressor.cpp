// Pooling of tokens into entries. Table: argument, its tensor, required, dtypes, ranks, source.
// docs/spec/ascend-operators.md 4.9 C, 10, 12. Our reading: what the page leaves open (widths,
// dtypes, shapes of tables) is as its sibling in vllm-ascend has it; state_block_table is needed;
// without start_pos a sequence starts at 0; A2 is refused as the page says, although the operator's
// definition registers the chip.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <map>

#include "fused_paged.h"

namespace softnpu {
namespace {

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

struct Compressor {
  at::Tensor x, wkv, wgate;
  Out state_cache;
  at::Tensor ape, state_block_table, cu_seqlens, seqused, start_pos;
  int64_t cmp_ratio, coff, cache_mode, state_cache_stride_dim0;
  Out cmp_kv;
  FIELDS(all, x, wkv, wgate, state_cache, ape, state_block_table, cu_seqlens, seqused, start_pos,
         cmp_ratio, coff, cache_mode, state_cache_stride_dim0, cmp_kv)

  bool flat() const { return x.dim() == 2; }
  bool ring() const { return cache_mode == 2; }
  int64_t channels() const { return wkv.size(0); }      // coff * width
  int64_t width() const { return wkv.size(0) / coff; }  // of an entry
  int64_t batch() const { return flat() ? cu_seqlens.numel() - 1 : x.size(0); }
  int64_t window() const { return coff * cmp_ratio; }  // tokens of an entry
  int64_t rows_of_output() const {
    if (!flat()) return ceil_div(x.size(1), cmp_ratio);
    return std::min(x.size(0), x.size(0) / cmp_ratio + batch());
  }
  void check_weights() const;
  void check_state() const;
  void check() const;
  void run() const;
};

void Compressor::check_weights() const {
  require(coff == 1 || coff == 2, "coff", text(coff), "1 or 2");
  require(power_of_two(cmp_ratio) && cmp_ratio >= 2 && cmp_ratio <= 128, "cmp_ratio",
          text(cmp_ratio), "a power of two, 2 to 128");
  const int64_t hidden = x.size(-1);
  require(hidden >= 1024 && hidden <= 10240 && hidden % 512 == 0, "x", show(x),
          "1024 to 10240 channels, a multiple of 512 (our reading)");
  require(wkv.scalar_type() == x.scalar_type() && wkv.size(1) == hidden &&
              (channels() == 128 * coff || channels() == 512 * coff),
          "wkv", show(wkv), "[coff * 128 or 512, channels of x] in the dtype of x");
  require(wgate.scalar_type() == x.scalar_type() && wgate.sizes() == wkv.sizes(), "wgate",
          show(wgate), "shape and dtype of wkv");
  require(ape.size(0) == cmp_ratio && ape.size(1) == channels(), "ape", show(ape),
          "[cmp_ratio, coff * width]");
}

void Compressor::check_state() const {
  const int64_t rows = state_cache->size(1);
  require(state_cache->size(2) == 2 * channels() && rows >= 1 && rows <= 1024, "state_cache",
          show(*state_cache), "[pages, 1 to 1024 rows, 2 * coff * width]");
  if (on_a5())
    paged::check_pages(*state_cache, "state_cache");
  else
    paged::check_dense(*state_cache, "state_cache");
  require(state_cache_stride_dim0 == state_cache->stride(0), "state_cache_stride_dim0",
          text(state_cache_stride_dim0), text(state_cache->stride(0)).c_str());
  require(cache_mode == 1 || (cache_mode == 2 && on_a5()), "cache_mode", text(cache_mode),
          "1; on A5 also 2 (ring)");
  require(state_block_table.dim() == (ring() ? 1 : 2) && state_block_table.size(0) == batch(),
          "state_block_table", show(state_block_table), "[B, columns], with cache_mode 2 [B]");
  if (ring() && !flat())
    require(rows >= window() + x.size(1) - 1, "state_cache", show(*state_cache),
            "coff * cmp_ratio + S - 1 rows with cache_mode 2");
}

void Compressor::check() const {
  require_family(kOnA3 | kOnA5);
  const Types& ints = paged::kLengths;
  check_table({{"x", x, true, kHalves, 2, 3, kDocument},
               {"wkv", wkv, true, kHalves, 2, 2, kDocument},
               {"wgate", wgate, true, kHalves, 2, 2, kDocument},
               {"state_cache", *state_cache, true, {kF32}, 3, 3, kDocument},
               {"ape", ape, true, {kF32}, 2, 2, kDocument},
               {"state_block_table", state_block_table, true, ints, 1, 2, kReading},
               {"cu_seqlens", cu_seqlens, false, ints, 1, 1, kDocument},
               {"seqused", seqused, false, ints, 1, 1, kDocument},
               {"start_pos", start_pos, false, ints, 1, 1, kDocument},
               {"cmp_kv", *cmp_kv, true, kHalves, 2, 3, kDocument}});
  require(flat() == paged::given(cu_seqlens), "cu_seqlens", show(cu_seqlens),
          "[B + 1] with x [T, d], nothing with [B, S, d]");
  check_weights();
  check_state();
  for (const auto& [tensor, name] : {std::pair(seqused, "seqused"), {start_pos, "start_pos"}})
    require(!paged::given(tensor) || tensor.numel() == batch(), name, show(tensor), "[B]");
  for (const auto& [tensor, name] :
       {std::pair(x, "x"), {wkv, "wkv"}, {wgate, "wgate"}, {ape, "ape"}, {*cmp_kv, "cmp_kv"}})
    paged::check_dense(tensor, name);
  std::vector<int64_t> shape = {rows_of_output(), width()};
  if (!flat()) shape.insert(shape.begin(), x.size(0));
  require(cmp_kv->scalar_type() == x.scalar_type() && cmp_kv->sizes() == at::IntArrayRef(shape),
          "cmp_kv", show(*cmp_kv),
          "[min(T, T / ratio + B), width], or [B, ceil(S / ratio), width], in the dtype of x");
}

// The state rows of a call. Page 0 of the table stands for no page: nothing is written there, and
// what is read is absent. Ours: a row that two tokens write, or that is read and written in one
// call, depends on the order of the cores, and faults.
class State {
 public:
  explicit State(const Compressor& call)
      : call_(call), table_(paged::values_of(call.state_block_table)) {}

  void write(int64_t b, int64_t position, In values) {
    const auto [page, row] = place(b, position);
    if (page == 0) return;
    const auto [known, first] = users_.insert({{page, row}, true});
    if (!first) conflict(page, row, known->second);
    (*call_.state_cache)[page][row].copy_(values);
  }

  // u and s behind each other, or nothing.
  at::Tensor read(int64_t b, int64_t position) {
    const auto [page, row] = place(b, position);
    if (page == 0) return {};
    const auto [known, first] = users_.insert({{page, row}, false});
    if (!first && known->second) conflict(page, row, false);
    return (*call_.state_cache)[page][row].clone();
  }

 private:
  std::pair<int64_t, int64_t> place(int64_t b, int64_t position) const {
    const int64_t rows = call_.state_cache->size(1), pages = call_.state_cache->size(0);
    const int64_t columns = call_.ring() ? 1 : call_.state_block_table.size(1);
    const int64_t column = call_.ring() ? 0 : position / rows;
    if (column >= columns)
      paged::fault("state_block_table", "position " + text(position) + " of sequence " + text(b) +
                                            " is beyond its " + text(columns) + " columns");
    const int64_t page = table_[static_cast<size_t>(b * columns + column)];
    if (page < 0 || page >= pages)
      paged::fault("state_block_table", "page " + text(page) + " of sequence " + text(b) +
                                            " is outside the " + text(pages) + " pages");
    return {page, position % rows};
  }

  [[noreturn]] static void conflict(int64_t page, int64_t row, bool written) {
    paged::fault("state_block_table", "row " + text(row) + " of page " + text(page) + " is " +
                                          (written ? "written twice" : "read and written") +
                                          " in one call");
  }

  const Compressor& call_;
  std::vector<int64_t> table_;
  std::map<std::pair<int64_t, int64_t>, bool> users_;  // whether it was written
};

// The pooled entry: for each channel a softmax over the slots, whose scores may all be absent.
at::Tensor pooled(const std::vector<at::Tensor>& values, const std::vector<at::Tensor>& scores) {
  return at::softmax(at::stack(scores), 0).mul(at::stack(values)).sum(0);
}

// Output rows behind the entries that close are not written.
void Compressor::run() const {
  state_cache.touch();
  cmp_kv.touch();
  const paged::Side side = {flat() ? "TND" : "BSND", x, cu_seqlens, {}, {}, "x", "cu_seqlens"};
  const auto spans = paged::spans(side, batch());
  const auto used = paged::values_of(seqused), starts = paged::values_of(start_pos);
  const at::Tensor tokens = x.flatten(0, -2).to(kF32), out = cmp_kv->flatten(0, -2);
  const at::Tensor u = at::matmul(tokens, wkv.to(kF32).t());
  const at::Tensor s = at::matmul(tokens, wgate.to(kF32).t());
  const at::Tensor nothing = at::zeros({width()}, kF32);
  const at::Tensor masked = at::full({width()}, -std::numeric_limits<float>::infinity(), kF32);
  State state(*this);
  int64_t packed = 0;
  for (int64_t b = 0; b < batch(); ++b) {
    const auto i = static_cast<size_t>(b);
    const int64_t start = starts.empty() ? 0 : starts[i];
    const int64_t count = used.empty() ? spans[i].count : used[i], first = spans[i].first;
    if (start < 0) paged::fault("start_pos", "found " + text(start) + ", expected 0 or more");
    if (count < 0 || count > spans[i].count)
      paged::fault("seqused", "found " + text(count) + ", expected 0 to " + text(spans[i].count));
    if (ring() && state_cache->size(1) < window() + count - 1)
      paged::fault("state_cache", text(state_cache->size(1)) + " rows of a ring, expected " +
                                      text(window() + count - 1));
    const auto scores = [&](int64_t t) { return s[first + t].add(ape[(start + t) % cmp_ratio]); };
    // Read before anything is written: what the call itself brings does not come from the state.
    int64_t row = flat() ? packed : b * rows_of_output();
    const int64_t from = start / cmp_ratio, end = (start + count) / cmp_ratio;
    for (int64_t entry = from; entry < end; ++entry) {
      std::vector<at::Tensor> values, weights;
      for (int64_t slot = 0; slot < window(); ++slot) {
        const int64_t position = (entry - coff + 1) * cmp_ratio + slot;
        const int64_t channel = slot / cmp_ratio * width();  // of the block before, then its own
        at::Tensor value = nothing, weight = masked;
        if (position >= start) {
          value = u[first + position - start].narrow(0, channel, width());
          weight = scores(position - start).narrow(0, channel, width());
        } else if (position >= 0) {
          const at::Tensor held = state.read(b, position);
          if (held.defined()) {
            value = held.narrow(0, channel, width());
            weight = held.narrow(0, channels() + channel, width());
          }
        }
        values.push_back(value);
        weights.push_back(weight);
      }
      out[row++].copy_(pooled(values, weights));
    }
    packed += end - from;
    for (int64_t t = 0; t < count; ++t)
      state.write(b, start + t, at::cat({u[first + t], scores(t)}));
  }
}

}  // namespace

NAMED(aclnnCompressor, Compressor, all, check, run)

}  // namespace softnpu
