#include "fused_sparse_layout.h"

namespace softnpu::sparse {
namespace {

int64_t batch_size(const Layout& layout, In query) {
  return layout.query == "TND" ? layout.query_lengths.numel() : query.size(0);
}

std::vector<int64_t> values_of(In x) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < x.numel(); ++i) values.push_back(x[i].item<int64_t>());
  return values;
}

void expect(bool condition, const std::string& message) {
  if (!condition) throw Fault(kKernelFault, message);
}

// Prefix sums of TND: where sequence i starts, and its length.
std::pair<int64_t, int64_t> part(const std::vector<int64_t>& ends, size_t i, int64_t rows,
                                 const char* name) {
  const int64_t first = i ? ends[i - 1] : 0;
  expect(first <= ends[i] && ends[i] <= rows,
         std::string(name) + " falls, or ends behind the tensor");
  return {first, ends[i] - first};
}

}  // namespace

void check_plain(In x, const char* name) {
  require(!x.defined() || x.is_contiguous(), name, show(x) + " with gaps", "a contiguous tensor");
}

void check_cache(const Layout& layout, In x, const char* name) {
  if (on_a5() && paged(layout))
    require(x.select(0, 0).is_contiguous(), name, show(x) + " with gaps",
            "gaps between pages only");
  else
    check_plain(x, name);
}

void check_modes(int64_t sparse_mode, int64_t before, int64_t after) {
  constexpr int64_t all = std::numeric_limits<int64_t>::max();
  require(sparse_mode == 0 || sparse_mode == 3, "sparse_mode", std::to_string(sparse_mode),
          "0 or 3");
  require(before == all, "pre_tokens", std::to_string(before), "2^63 - 1");
  require(after == all, "next_tokens", std::to_string(after), "2^63 - 1");
}

void check_width(In x, const char* name, int64_t width, const char* expected) {
  require(x.size(-1) == width, name, show(x), expected);
}

void check_layout(const Layout& layout, In query, In key) {
  const auto named = [](bool good, const char* name, In x, const char* expected) {
    require(good, name, show(x), expected);
  };
  require(layout.query == "BSND" || layout.query == "TND", "layout_query", layout.query,
          "BSND or TND");
  require(paged(layout) || layout.key == layout.query, layout.key_layout_name, layout.key,
          "PA_BSND or layout_query");
  named(query.dim() == (layout.query == "TND" ? 3 : 4), "query", query,
        "4 dimensions (BSND) or 3 (TND)");
  named(key.dim() == (layout.key == "TND" ? 3 : 4), "key", key,
        "4 dimensions (BSND, PA_BSND) or 3 (TND)");
  named(key.size(-2) == 1, "key", key, "one head");
  named(layout.query != "TND" || layout.query_lengths.defined(), "actual_seq_lengths_query",
        layout.query_lengths, "prefix sums, as layout_query is TND");
  named(layout.key == "BSND" || layout.key_lengths.defined(), layout.key_lengths_name,
        layout.key_lengths, "lengths, as the keys are TND or PA_BSND");
  // A table beside keys that are not paged is refused by CANN's tiling, not by its document: our
  // reading.
  named(layout.blocks.defined() == paged(layout), "block_table", layout.blocks,
        "a table for PA_BSND, else nothing");
  const int64_t batch = batch_size(layout, query);
  named(!layout.query_lengths.defined() || layout.query_lengths.numel() == batch,
        "actual_seq_lengths_query", layout.query_lengths, "a value for each sequence");
  named(!layout.key_lengths.defined() || layout.key_lengths.numel() == batch,
        layout.key_lengths_name, layout.key_lengths, "a value for each sequence");
  named(layout.key != "BSND" || key.size(0) == batch, "key", key, "query's batch size");
  if (!paged(layout)) return;
  named(layout.blocks.size(0) == batch, "block_table", layout.blocks, "a row for each sequence");
  named(key.size(1) > 0 && key.size(1) % 16 == 0 && key.size(1) <= 1024, "key", key,
        "a block size that is a multiple of 16, up to 1024");
}

std::vector<Sequence> sequences(const Layout& layout, In query, In key) {
  const auto queries =
      layout.query_lengths.defined() ? values_of(layout.query_lengths) : std::vector<int64_t>();
  const auto keys =
      layout.key_lengths.defined() ? values_of(layout.key_lengths) : std::vector<int64_t>();
  const int64_t longest =
      paged(layout) ? layout.blocks.size(1) * key.size(1) : key.size(layout.key == "BSND" ? 1 : 0);
  std::vector<Sequence> result;
  for (int64_t b = 0; b < batch_size(layout, query); ++b) {
    const auto i = static_cast<size_t>(b);
    Sequence sequence{b, 0, 0, 0, 0, keys.empty() ? longest : keys[i]};
    if (layout.query == "TND") {
      std::tie(sequence.first_query, sequence.queries) =
          part(queries, i, query.size(0), "actual_seq_lengths_query");
    } else {
      sequence.first_query = b * query.size(1);
      sequence.queries = queries.empty() ? query.size(1) : queries[i];
      sequence.padding = query.size(1) - sequence.queries;
    }
    if (layout.key == "TND")
      std::tie(sequence.first_key, sequence.keys) =
          part(keys, i, key.size(0), layout.key_lengths_name);
    expect(sequence.queries >= 0 && sequence.padding >= 0,
           "actual_seq_lengths_query is negative or beyond query");
    expect(sequence.keys >= 0 && sequence.keys <= longest,
           std::string(layout.key_lengths_name) + " is negative or beyond the keys");
    result.push_back(sequence);
  }
  return result;
}

at::Tensor rows_of(const Layout& layout, In cache, const Sequence& sequence) {
  if (layout.key == "TND") return cache.narrow(0, sequence.first_key, sequence.keys).flatten(1);
  if (layout.key == "BSND") return cache[sequence.batch].narrow(0, 0, sequence.keys).flatten(1);
  const int64_t used = (sequence.keys + cache.size(1) - 1) / cache.size(1);
  const at::Tensor blocks = layout.blocks[sequence.batch].narrow(0, 0, used).to(at::kLong);
  for (const int64_t block : values_of(blocks))
    expect(block >= 0 && block < cache.size(0),
           "block_table names a block that is not in the cache");
  return cache.index_select(0, blocks).flatten(0, 1).narrow(0, 0, sequence.keys).flatten(1);
}

}  // namespace softnpu::sparse
