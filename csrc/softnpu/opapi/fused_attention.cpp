// FusedInferAttentionScore V2 to V5: attention of the serving path, paged or not, with rotary
// parts, sinks and masks.
#include "fused_attention.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace softnpu::attention {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor from_heads(In x,
                      const std::string& layout) {  // the inverse of heads_first, for NBSD too
  if (layout == "BSH")
    return x.transpose(1, 2).reshape({x.size(0), x.size(2), x.size(1) * x.size(3)});
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "NBSD" || layout == "TND") return x.transpose(0, 1);
  return x;  // BNSD, NTD
}

// The first `length` rows of a sequence's blocks: [heads, length, width].
at::Tensor paged(In cache, In table, int64_t heads, int64_t length) {
  const int64_t block = cache.size(cache.dim() == 3 ? 1 : cache.dim() == 4 ? 2 : 3);
  const at::Tensor ids = table.slice(0, 0, (length + block - 1) / block).to(at::kLong);
  for (int64_t i = 0; i < ids.size(0); ++i)
    if (const int64_t id = ids[i].item<int64_t>(); id < 0 || id >= cache.size(0))
      throw Fault(kKernelFault, "argument 'blockTable': block " + std::to_string(id) + " of " +
                                    std::to_string(cache.size(0)));
  const at::Tensor x = cache.index_select(0, ids);
  const at::Tensor rows = x.dim() == 3 ? x.view({x.size(0), block, heads, x.size(2) / heads})
                          : x.dim() == 4
                              ? x.transpose(1, 2)
                              : x.permute({0, 3, 1, 2, 4}).flatten(3);  // tiles of 16 columns
  return rows.flatten(0, 1).slice(0, 0, length).transpose(0, 1).to(kF32);
}

at::Tensor rows_of(In x, In table, const Attention& call, const Sizes& sizes, int64_t b,
                   std::pair<int64_t, int64_t> range) {
  if (sizes.paged) return paged(x, table.select(0, b), call.key_heads, range.second);
  const at::Tensor all = heads_first(x, sizes.layout->query, call.key_heads);
  return (sizes.tokens ? all : all.select(0, b))
      .slice(1, range.first, range.first + range.second)
      .to(kF32);
}

// True where a query does not see a key: [queries, keys].
at::Tensor hidden(const Attention& call, const Sizes& sizes, int64_t b, int64_t queries,
                  int64_t keys) {
  const at::Tensor key = at::arange(keys), query = at::arange(queries).unsqueeze(1);
  const int64_t shift = keys - queries, sparse = ignores_sparse(call, sizes) ? 1 : call.sparse;
  if (sparse == 2) return key.gt(query);
  if (sparse == 3) return key.gt(query.add(shift));
  if (sparse == 4)
    return key.gt(query.add(shift + call.after)).logical_or(key.lt(query.add(shift - call.before)));
  if (!call.mask.defined()) return at::zeros({queries, keys}, at::kBool);
  const bool one_row = call.mask.dim() == 2 && sizes.queries == 1;  // (B, KV_S)
  at::Tensor mask = call.mask.dim() == 4   ? call.mask.squeeze(1)
                    : call.mask.dim() == 3 ? call.mask
                                           : call.mask.unsqueeze(one_row);
  mask = mask.select(0, mask.size(0) == 1 ? 0 : b)
             .slice(0, 0, queries)
             .slice(1, 0, keys)
             .to(at::kBool);
  if (sparse == 1) return mask;
  return mask.logical_or(key.gt(query.add(call.after))).logical_or(key.lt(query.sub(call.before)));
}

// The caller warrants that a mask of 2048 is the triangle. What another one gives (a band drawn
// into the mask, as some serving code does for sliding windows) is not documented and not emulated;
// better a fault than a wrong result.
void require_triangle(const Attention& call, const Sizes& sizes) {
  if (!call.mask.defined() || call.sparse < 2 || ignores_sparse(call, sizes)) return;
  static const at::Tensor triangle = at::ones({2048, 2048}, at::kBool).triu(1);
  if (!call.mask.view({2048, 2048}).to(at::kBool).equal(triangle))
    throw Fault(kKernelFault,
                "argument 'attenMask': sparseMode 2 to 4 wants ones above the diagonal and zeros "
                "elsewhere (others are "
                "not emulated)");
}

// q [N, Sq, D], k [N / G, Skv, D], v [N / G, Skv, Dv]: the result and log(sum(exp)), of no rows 0
// and infinity.
std::pair<at::Tensor, at::Tensor> attend(In q, In k, In v, In shift, In sink, In unseen,
                                         double scale) {
  const int64_t groups = k.size(0), queries = q.size(1);
  at::Tensor logits = at::matmul(q.reshape({groups, -1, q.size(2)}), k.transpose(1, 2)).mul(scale);
  logits = logits.view({q.size(0), queries, k.size(1)});
  if (shift.defined()) logits = logits.add(shift);
  logits = logits.masked_fill(unseen, -kInfinity);
  const at::Tensor blind = unseen.all(1, true).expand({q.size(0), queries, 1});
  at::Tensor largest = at::amax(logits, {-1}, true).masked_fill(blind, 0);
  at::Tensor drain;
  if (sink.defined()) {
    drain = sink.to(kF32).view({-1, 1, 1});
    largest = at::maximum(largest, drain);
  }
  const at::Tensor e = at::exp(logits.sub(largest));
  at::Tensor sum = e.sum(-1, true);
  if (sink.defined())
    sum = sum.add(at::exp(drain.sub(largest)));  // it takes weight and gives no value
  const at::Tensor p = e.div(sum).masked_fill(blind, 0);
  const at::Tensor o =
      at::matmul(p.view({groups, -1, k.size(1)}), v).view({q.size(0), queries, v.size(2)});
  return {o, at::log(sum).add(largest).masked_fill(blind, kInfinity)};  // kReading: with the sink
}

void run_attention(const Attention& call) {
  const Sizes sizes = sizes_of(call);
  require_triangle(call, sizes);
  const at::Tensor query = heads_first(call.query, sizes.layout->query, call.heads);
  std::vector<int64_t> shape = query.sizes().vec();
  shape.back() = sizes.value_width;
  // kReading: rows behind a sequence's length, and rows that see no key whatever innerPrecise says,
  // are 0 and infinity.
  const at::Tensor result = at::zeros(shape, kF32);
  shape.back() = 1;
  const at::Tensor sums = at::full(shape, kInfinity, kF32);
  const bool shared = sizes.form == Form::kDecode && on_a5();  // V5: value has no effect then
  for (int64_t b = 0; b < (call.query.numel() && call.key.numel() ? sizes.batch : 0); ++b) {
    const auto mine = query_range(call, sizes, b), seen = key_range(call, sizes, b);
    if (!mine.second || !seen.second) continue;
    const auto part = [&](const at::Tensor& x) {
      return (sizes.tokens ? x : x.select(0, b)).slice(1, mine.first, mine.first + mine.second);
    };
    at::Tensor q = part(query).to(kF32), k = rows_of(call.key, call.table, call, sizes, b, seen),
               shift;
    const at::Tensor v = shared ? k : rows_of(call.value, call.table, call, sizes, b, seen);
    if (sizes.form != Form::kGrouped) {
      q = at::cat({q, part(heads_first(call.query_rope, sizes.layout->query, call.heads)).to(kF32)},
                  -1);
      k = at::cat({k, rows_of(call.key_rope, call.table, call, sizes, b, seen)}, -1);
    }
    if (call.pse.defined())
      shift = call.pse.select(0, call.pse.size(0) == 1 ? 0 : b)
                  .slice(1, 0, mine.second)
                  .slice(2, 0, seen.second)
                  .to(kF32);
    const auto [o, sum] = attend(q, k, v, shift, call.sink,
                                 hidden(call, sizes, b, mine.second, seen.second), call.scale);
    part(result).copy_(o);
    part(sums).copy_(sum);
  }
  call.out = from_heads(result, sizes.layout->out);
  if (call.wants_lse)
    call.lse = sizes.tokens ? sums.transpose(0, 1) : sums;
  else if (call.lse)  // torch_npu's page: [1], and 0
    call.lse = at::zeros(call.lse->sizes());
}

void check_rope(const Attention& call, const Sizes& sizes) {
  require(call.query_rope.defined() == call.key_rope.defined(),
          call.query_rope.defined() ? "keyRope" : "queryRope", "nothing",
          "both rotary tensors, or none");
  if (!call.query_rope.defined()) return;
  const auto beside = [](In x, int64_t axis, int64_t size) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape[static_cast<size_t>(axis < 0 ? axis + x.dim() : axis)] = size;
    return shape;
  };
  const bool flat = std::string(sizes.layout->query) == "BSH";
  require(call.query_rope.sizes() == beside(call.query, -1, flat ? 64 * call.heads : 64),
          "queryRope", show(call.query_rope), "the shape of query with D 64");
  const auto keys = sizes.paged && call.key.dim() == 5 ? beside(call.key, 2, 4)
                    : (sizes.paged ? call.key.dim() == 3 : flat)
                        ? beside(call.key, -1, 64 * call.key_heads)
                        : beside(call.key, -1, 64);
  require(call.key_rope.sizes() == keys, "keyRope", show(call.key_rope),
          "the shape of key with D 64");
}

int64_t cache_width(In x, const Attention& call, const char* argument) {
  const int64_t rank = x.dim(), block = x.size(rank == 3 ? 1 : rank == 4 ? 2 : 3);
  // kReading: blockSize is that of the cache.
  require(block == call.block && block > 0, "blockSize", std::to_string(call.block),
          "the block size of the cache");
  require(
      rank == 3 ? x.size(2) % call.key_heads == 0 : x.size(1) == call.key_heads, argument, show(x),
      "[blocks, block size, H], [blocks, N, block size, D] or [blocks, N, D / 16, block size, 16]");
  require(rank < 5 || x.size(4) == 16, argument, show(x), "tiles of 16 columns");
  return rank == 3 ? x.size(2) / call.key_heads : rank == 4 ? x.size(3) : x.size(2) * 16;
}

}  // namespace

at::Tensor heads_first(In x, const std::string& layout, int64_t heads) {
  if (layout == "BSH")
    return x.view({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "TND") return x.transpose(0, 1);
  return x;  // BNSD, NTD
}

Sizes sizes_of(const Attention& call) {
  Sizes sizes{};
  sizes.layout = find_layout(call.layout);
  const std::string layout = sizes.layout->query;
  const auto rank = static_cast<int64_t>(layout.size());
  sizes.tokens = layout == "TND" || layout == "NTD";
  sizes.paged = call.table.defined();
  require(call.heads > 0 && call.key_heads > 0, "numKeyValueHeads", std::to_string(call.key_heads),
          "more than 0");
  const auto fits = [&](In x, int64_t heads, const char* argument) {
    require(x.dim() == rank && (layout != "BSH" || x.size(2) % heads == 0), argument, show(x),
            "the layout's shape");
    const at::Tensor seen = heads_first(x, layout, heads);
    require(seen.size(-3) == heads, argument, show(x),
            "as many heads as numHeads or numKeyValueHeads");
    return seen;
  };
  const at::Tensor q = fits(call.query, call.heads, "query");
  sizes.batch = !sizes.tokens        ? q.size(0)
                : call.query_lengths ? static_cast<int64_t>(call.query_lengths->size())
                                     : 0;
  sizes.queries = q.size(-2);
  sizes.width = q.size(-1);
  sizes.form = !call.query_rope.defined() ? Form::kGrouped
               : sizes.width == 512       ? Form::kDecode
                                          : Form::kPrefill;
  int64_t key_width = 0;
  if (sizes.paged) {
    key_width = cache_width(call.key, call, "key");
    sizes.value_width = cache_width(call.value, call, "value");
    require(call.value.dim() == call.key.dim() && call.value.size(0) == call.key.size(0), "value",
            show(call.value), "the blocks of key");
    sizes.keys = call.table.size(1) * call.block;
  } else {
    const at::Tensor k = fits(call.key, call.key_heads, "key"),
                     v = fits(call.value, call.key_heads, "value");
    require(sizes.tokens || k.size(0) == sizes.batch, "key", show(call.key),
            "as many sequences as query");
    require(v.sizes().slice(0, static_cast<size_t>(v.dim()) - 1) ==
                k.sizes().slice(0, static_cast<size_t>(k.dim()) - 1),
            "value", show(call.value), "the shape of key (but for D)");
    key_width = k.size(-1);
    sizes.value_width = v.size(-1);
    sizes.keys = k.size(-2);
  }
  require(key_width == sizes.width, "key", show(call.key), "the head size of query");
  check_rope(call, sizes);
  return sizes;
}

std::pair<int64_t, int64_t> range(const std::optional<std::vector<int64_t>>& lengths, bool ends,
                                  int64_t all, int64_t b) {
  if (!lengths) return {0, all};
  const auto i = static_cast<size_t>(b);
  if (!ends) return {0, (*lengths)[lengths->size() == 1 ? 0 : i]};
  const int64_t start = i ? (*lengths)[i - 1] : 0;
  return {start, (*lengths)[i] - start};
}

std::pair<int64_t, int64_t> query_range(const Attention& call, const Sizes& sizes, int64_t b) {
  // A2 and A3: without effect when Q_S is 1.
  const bool ignored = !on_a5() && !sizes.tokens && sizes.queries == 1;
  return range(ignored ? std::nullopt : call.query_lengths, sizes.tokens, sizes.queries, b);
}

std::pair<int64_t, int64_t> key_range(const Attention& call, const Sizes& sizes, int64_t b) {
  return range(call.key_lengths, sizes.tokens && !sizes.paged, sizes.keys, b);
}

// V4: sparseMode, preTokens and nextTokens have no effect here.
bool ignores_sparse(const Attention& call, const Sizes& sizes) {
  const bool plain = call.layout == "BSH" || call.layout == "BSND" || call.layout == "BNSD";
  return !on_a5() && plain && sizes.queries == 1 && sizes.width == sizes.value_width &&
         sizes.form == Form::kGrouped;
}

Attention::Attention(const Arguments& arguments) : Arguments(arguments) {
  if (!keys.empty()) key = keys[0];
  if (!values.empty()) value = values[0];
  // No sequence is longer than 32 bits say; more would overflow in sums with positions.
  const auto bounded = [](int64_t tokens) {
    return std::clamp<int64_t>(tokens, INT32_MIN, INT32_MAX);
  };
  before = bounded(before);
  after = bounded(after);
  if (!key_heads) key_heads = heads;
}

void Arguments::check_a23() const {
  require_generation(kOnA2 | kOnA3);
  check_attention(Attention(*this));
}

void Arguments::check_a5() const {
  require_generation(kOnA5);
  check_attention(Attention(*this));
}

void Arguments::run() const { run_attention(Attention(*this)); }

// Of IncreFlashAttention: one query in each sequence sees all its keys.
Arguments Arguments::of_one_query() const {
  Arguments all = *this;
  all.before = all.after = INT32_MAX;
  all.wants_lse = false;
  return all;
}

void Arguments::check_incremental() const {
  require(layout == "BSH" || layout == "BSND" || layout == "BNSD", "inputLayout", layout,
          "BSH, BSND or BNSD");
  const Attention call(of_one_query());
  check_attention(call);
  require(sizes_of(call).queries == 1, "query", show(query), "one query in each sequence");
}

// Of PromptFlashAttention: single tensors, and lengths that may be empty.
Arguments Arguments::of_prompt() const {
  Arguments all = *this;
  all.keys = {one_key}, all.values = {one_value};
  for (auto* lengths : {&all.query_lengths, &all.key_lengths})
    if (*lengths && (*lengths)->empty()) lengths->reset();
  all.wants_lse = false;
  return all;
}

void Arguments::check_prompt() const {
  require(layout == "BSH" || layout == "BSND" || layout == "BNSD" || layout == "BNSD_BSND",
          "inputLayout", layout, "BSH, BSND, BNSD or BNSD_BSND");
  check_attention(Attention(of_prompt()));
}

void Arguments::run_prompt() const { run_attention(Attention(of_prompt())); }

void Arguments::run_incremental() const { run_attention(Attention(of_one_query())); }

#define ATTENTION(VERSION, CHECK)                                                   \
  NAMED(aclnnFusedInferAttentionScoreV##VERSION, Arguments, v##VERSION, CHECK, run) \
  SOFTNPU_C int aclnnFusedInferAttentionScoreV##VERSION##GetMaxWorkspaceSize()      \
      __attribute__((ifunc("softnpu_phase1_aclnnFusedInferAttentionScoreV" #VERSION)))

ATTENTION(2, check_a23);
ATTENTION(3, check_a23);
ATTENTION(4, check_a23);
ATTENTION(5, check_a5);

// hicann/ops-transformer attention/incre_flash_attention/docs/aclnnIncreFlashAttentionV4.md
NAMED(aclnnIncreFlashAttentionV4, Arguments, incremental, check_incremental, run_incremental)
// ... attention/prompt_flash_attention/docs/aclnnPromptFlashAttentionV3.md
NAMED(aclnnPromptFlashAttentionV3, Arguments, prompt, check_prompt, run_prompt)

}  // namespace softnpu::attention
