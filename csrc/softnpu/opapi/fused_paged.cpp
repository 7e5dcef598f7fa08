#include "fused_paged.h"

#include <ATen/ops/tensor.h>

#include <numeric>
#include <unordered_set>

namespace softnpu::paged {
namespace {

bool is_paged(const Side& side) { return side.layout == "PA_BBND"; }

at::Tensor indices(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

}  // namespace

void fault(const char* argument, const std::string& what) {
  throw Fault(kKernelFault, std::string("argument '") + argument + "': " + what);
}

std::vector<int64_t> range(int64_t first, int64_t end) {
  std::vector<int64_t> result(static_cast<size_t>(std::max<int64_t>(end - first, 0)));
  std::iota(result.begin(), result.end(), first);
  return result;
}

int64_t batch_size(const Side& queries) {
  return queries.layout == "TND" ? queries.cu_seqlens.numel() - 1 : queries.x.size(0);
}

void check_dense(In x, const char* name) {
  require(!x.defined() || x.is_contiguous(), name, show(x) + " with gaps", "a contiguous tensor");
}

void check_pages(In pool, const char* name) {
  const bool dense = pool.numel() == 0 || pool.select(0, 0).is_contiguous();
  require(dense, name, show(pool) + " with gaps", "gaps between pages only");
}

void check_page_size(In pool, const char* name) {
  const int64_t rows = pool.size(1);
  if (on_a5())
    require(rows >= 1 && rows <= 1024, name, show(pool), "pages of 1 to 1024 rows");
  else
    require(rows > 0 && rows % 16 == 0 && rows <= 1024, name, show(pool),
            "pages of a multiple of 16 rows, up to 1024");
}

void check_queries(const Side& side, bool takes_seqused) {
  const bool flat = side.layout == "TND";
  require(flat || side.layout == "BSND", side.layout_name, side.layout, "TND or BSND");
  require(side.x.dim() == (flat ? 3 : 4), side.name, show(side.x),
          "[T, N, D] (TND) or [B, S, N, D] (BSND)");
  require(flat == given(side.cu_seqlens), side.cu_seqlens_name, show(side.cu_seqlens),
          "[B + 1] with TND, nothing with BSND (our reading)");
  const bool used = given(side.seqused);
  require(!used || takes_seqused, side.seqused_name, show(side.seqused), "nothing (unsupported)");
  require(!used || !flat, side.seqused_name, show(side.seqused), "nothing with TND (our reading)");
  require(!used || side.seqused.numel() == side.x.size(0), side.seqused_name, show(side.seqused),
          "[B]");
  check_dense(side.x, side.name);
}

void check_keys(const Side& side, const std::string& layout_q, int64_t batch) {
  const bool flat = side.layout == "TND", paged = is_paged(side);
  require(paged || side.layout == layout_q, side.layout_name, side.layout, "PA_BBND, or layout_q");
  require(side.x.dim() == (flat ? 3 : 4), side.name, show(side.x),
          "[pages, rows, 1, D] (PA_BBND), [T, 1, D] (TND) or [B, S, 1, D] (BSND)");
  require(side.x.size(-2) == 1, side.name, show(side.x), "one head");
  require(given(side.block_table) == paged, side.block_table_name, show(side.block_table),
          "a table with PA_BBND, else nothing (our reading)");
  require(given(side.cu_seqlens) == flat, side.cu_seqlens_name, show(side.cu_seqlens),
          "[B + 1] with TND, else nothing (our reading)");
  require(!flat || side.cu_seqlens.numel() == batch + 1, side.cu_seqlens_name,
          show(side.cu_seqlens), "[B + 1]");
  const bool used = given(side.seqused);
  require(used || !paged || batch == 0, side.seqused_name, show(side.seqused),
          "a length for each sequence, as the keys are paged");
  require(!used || (!flat && side.seqused.numel() == batch), side.seqused_name, show(side.seqused),
          "[B], nothing with TND (our reading)");
  if (!paged) {
    check_dense(side.x, side.name);
    require(flat || side.x.size(0) == batch, side.name, show(side.x), "the batch of the queries");
    return;
  }
  require(side.block_table.size(0) == batch, side.block_table_name, show(side.block_table),
          "a row for each sequence");
  check_dense(side.block_table, side.block_table_name);
  check_page_size(side.x, side.name);
  check_pages(side.x, side.name);
}

std::vector<int64_t> values_of(In x) {
  if (!given(x)) return {};
  const at::Tensor flat = x.reshape({-1}).to(at::kLong).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

std::vector<Span> spans(const Side& side, int64_t batch) {
  const auto starts = values_of(side.cu_seqlens), used = values_of(side.seqused);
  const bool flat = side.layout == "TND";
  std::vector<Span> result;
  if (flat && starts[0] != 0)
    fault(side.cu_seqlens_name, "found sums that begin with " + text(starts[0]) + ", expected 0");
  for (int64_t b = 0; b < batch; ++b) {
    const auto i = static_cast<size_t>(b);
    if (flat) {
      if (starts[i + 1] < starts[i] || starts[i + 1] > side.x.size(0))
        fault(side.cu_seqlens_name, "found the sum " + text(starts[i + 1]) + " behind " +
                                        text(starts[i]) + ", expected no less, up to " +
                                        text(side.x.size(0)));
      result.push_back({starts[i], starts[i + 1] - starts[i], 0});
      continue;
    }
    const int64_t held =
        is_paged(side) ? side.block_table.size(1) * side.x.size(1) : side.x.size(1);
    const int64_t count = used.empty() ? held : used[i];
    if (count < 0 || count > held)
      fault(side.seqused_name, "found the length " + text(count) + " of sequence " + text(b) +
                                   ", expected 0 to " + text(held));
    result.push_back({is_paged(side) ? 0 : b * held, count, is_paged(side) ? 0 : held - count});
  }
  return result;
}

Keys::Keys(const Side& side, int64_t batch)
    : side(side),
      pool(side.layout == "TND" ? side.x.unsqueeze(0) : side.x),
      spans(paged::spans(side, batch)),
      table_(static_cast<size_t>(batch)) {
  if (is_paged(side))
    for (int64_t b = 0; b < batch; ++b)
      table_[static_cast<size_t>(b)] = values_of(side.block_table[b]);
}

Places Keys::places(int64_t b, const std::vector<int64_t>& positions) const {
  const auto& row = table_[static_cast<size_t>(b)];
  const int64_t size = pool.size(1);
  std::vector<int64_t> pages, rows;
  for (const int64_t position : positions) {
    if (!is_paged(side)) {
      const bool flat = side.layout == "TND";
      pages.push_back(flat ? 0 : b);
      rows.push_back(flat ? spans[static_cast<size_t>(b)].first + position : position);
      continue;
    }
    const int64_t page = row[static_cast<size_t>(position / size)];
    if (page < 0 || page >= pool.size(0))
      fault(side.block_table_name, "position " + text(position) + " of sequence " + text(b) +
                                       " is on page " + text(page) + ", outside the " +
                                       text(pool.size(0)) + " pages of " + side.name);
    pages.push_back(page);
    rows.push_back(position % size);
  }
  return {indices(pages), indices(rows)};
}

std::vector<int64_t> slots_of(In mapping, int64_t limit, const char* argument) {
  auto slots = values_of(mapping);
  std::unordered_set<int64_t> seen;
  for (const int64_t slot : slots) {
    if (slot < -1 || slot >= limit)
      fault(argument,
            "slot " + text(slot) + ", expected -1 (nothing is stored) to " + text(limit - 1));
    if (slot >= 0 && !seen.insert(slot).second)
      fault(argument, "slot " + text(slot) + " is named twice, which row stays is undefined");
  }
  return slots;
}

}  // namespace softnpu::paged
