// FusedInferAttentionScore V2 to V5: attention of the serving path, paged or not, with rotary parts, sinks and masks.
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

at::Tensor from_heads(In x, const std::string& layout) {  // the inverse of heads_first, for NBSD too
  if (layout == "BSH") return x.transpose(1, 2).reshape({x.size(0), x.size(2), x.size(1) * x.size(3)});
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
      throw Fault(kKernelFault,
                  "argument 'blockTable': block " + std::to_string(id) + " of " + std::to_string(cache.size(0)));
  const at::Tensor x = cache.index_select(0, ids);
  const at::Tensor rows = x.dim() == 3   ? x.view({x.size(0), block, heads, x.size(2) / heads})
                          : x.dim() == 4 ? x.transpose(1, 2)
                                         : x.permute({0, 3, 1, 2, 4}).flatten(3);  // tiles of 16 columns
  return rows.flatten(0, 1).slice(0, 0, length).transpose(0, 1).to(kF32);
}

at::Tensor rows_of(In x, In table, const Attention& a, const Sizes& s, int64_t b, std::pair<int64_t, int64_t> range) {
  if (s.paged) return paged(x, table.select(0, b), a.key_heads, range.second);
  const at::Tensor all = heads_first(x, s.layout->query, a.key_heads);
  return (s.tokens ? all : all.select(0, b)).slice(1, range.first, range.first + range.second).to(kF32);
}

// True where a query does not see a key: [queries, keys].
at::Tensor hidden(const Attention& a, const Sizes& s, int64_t b, int64_t queries, int64_t keys) {
  const at::Tensor key = at::arange(keys), query = at::arange(queries).unsqueeze(1);
  const int64_t shift = keys - queries, sparse = ignores_sparse(a, s) ? 1 : a.sparse;
  if (sparse == 2) return key.gt(query);
  if (sparse == 3) return key.gt(query.add(shift));
  if (sparse == 4) return key.gt(query.add(shift + a.after)).logical_or(key.lt(query.add(shift - a.before)));
  if (!a.mask.defined()) return at::zeros({queries, keys}, at::kBool);
  const bool one_row = a.mask.dim() == 2 && s.queries == 1;  // (B, KV_S)
  at::Tensor mask = a.mask.dim() == 4 ? a.mask.squeeze(1) : a.mask.dim() == 3 ? a.mask : a.mask.unsqueeze(one_row);
  mask = mask.select(0, mask.size(0) == 1 ? 0 : b).slice(0, 0, queries).slice(1, 0, keys).to(at::kBool);
  if (sparse == 1) return mask;
  return mask.logical_or(key.gt(query.add(a.after))).logical_or(key.lt(query.sub(a.before)));
}

// The caller warrants that a mask of 2048 is the triangle. What another one gives (a band drawn into the mask, as some
// serving code does for sliding windows) is not documented and not emulated; better a fault than a wrong result.
void require_triangle(const Attention& a, const Sizes& s) {
  if (!a.mask.defined() || a.sparse < 2 || ignores_sparse(a, s)) return;
  static const at::Tensor triangle = at::ones({2048, 2048}, at::kBool).triu(1);
  if (!a.mask.view({2048, 2048}).to(at::kBool).equal(triangle))
    throw Fault(kKernelFault,
                "argument 'attenMask': sparseMode 2 to 4 wants ones above the diagonal and zeros elsewhere (others are "
                "not emulated)");
}

// q [N, Sq, D], k [N / G, Skv, D], v [N / G, Skv, Dv]: the result and log(sum(exp)), of no rows 0 and infinity.
std::pair<at::Tensor, at::Tensor> attend(In q, In k, In v, In shift, In sink, In unseen, double scale) {
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
  if (sink.defined()) sum = sum.add(at::exp(drain.sub(largest)));  // it takes weight and gives no value
  const at::Tensor p = e.div(sum).masked_fill(blind, 0);
  const at::Tensor o = at::matmul(p.view({groups, -1, k.size(1)}), v).view({q.size(0), queries, v.size(2)});
  return {o, at::log(sum).add(largest).masked_fill(blind, kInfinity)};  // kReading: with the sink
}

void run(const Attention& a, Out out, Out lse) {
  const Sizes s = sizes_of(a);
  require_triangle(a, s);
  const at::Tensor query = heads_first(a.query, s.layout->query, a.heads);
  std::vector<int64_t> shape = query.sizes().vec();
  shape.back() = s.value_width;
  // kReading: rows behind a sequence's length, and rows that see no key whatever innerPrecise says, are 0 and infinity.
  const at::Tensor result = at::zeros(shape, kF32);
  shape.back() = 1;
  const at::Tensor sums = at::full(shape, kInfinity, kF32);
  const bool shared = s.form == Form::kDecode && on_a5();  // V5: value has no effect then
  for (int64_t b = 0; b < (a.query.numel() && a.key.numel() ? s.batch : 0); ++b) {
    const auto mine = query_range(a, s, b), seen = key_range(a, s, b);
    if (!mine.second || !seen.second) continue;
    const auto part = [&](const at::Tensor& x) {
      return (s.tokens ? x : x.select(0, b)).slice(1, mine.first, mine.first + mine.second);
    };
    at::Tensor q = part(query).to(kF32), k = rows_of(a.key, a.table, a, s, b, seen), shift;
    const at::Tensor v = shared ? k : rows_of(a.value, a.table, a, s, b, seen);
    if (s.form != Form::kGrouped) {
      q = at::cat({q, part(heads_first(a.query_rope, s.layout->query, a.heads)).to(kF32)}, -1);
      k = at::cat({k, rows_of(a.key_rope, a.table, a, s, b, seen)}, -1);
    }
    if (a.pse.defined())
      shift = a.pse.select(0, a.pse.size(0) == 1 ? 0 : b).slice(1, 0, mine.second).slice(2, 0, seen.second).to(kF32);
    const auto [o, sum] = attend(q, k, v, shift, a.sink, hidden(a, s, b, mine.second, seen.second), a.scale);
    part(result).copy_(o);
    part(sums).copy_(sum);
  }
  out = from_heads(result, s.layout->out);
  if (a.wants_lse) lse = s.tokens ? sums.transpose(0, 1) : sums;
}

void check_rope(const Attention& a, const Sizes& s) {
  require(a.query_rope.defined() == a.key_rope.defined(), a.query_rope.defined() ? "keyRope" : "queryRope", "nothing",
          "both rotary tensors, or none");
  if (!a.query_rope.defined()) return;
  const auto beside = [](In x, int64_t axis, int64_t size) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape[static_cast<size_t>(axis < 0 ? axis + x.dim() : axis)] = size;
    return shape;
  };
  const bool flat = std::string(s.layout->query) == "BSH";
  require(a.query_rope.sizes() == beside(a.query, -1, flat ? 64 * a.heads : 64), "queryRope", show(a.query_rope),
          "the shape of query with D 64");
  const auto keys = s.paged && a.key.dim() == 5           ? beside(a.key, 2, 4)
                    : (s.paged ? a.key.dim() == 3 : flat) ? beside(a.key, -1, 64 * a.key_heads)
                                                          : beside(a.key, -1, 64);
  require(a.key_rope.sizes() == keys, "keyRope", show(a.key_rope), "the shape of key with D 64");
}

int64_t cache_width(In x, const Attention& a, const char* argument) {
  const int64_t rank = x.dim(), block = x.size(rank == 3 ? 1 : rank == 4 ? 2 : 3);
  // kReading: blockSize is that of the cache.
  require(block == a.block && block > 0, "blockSize", std::to_string(a.block), "the block size of the cache");
  require(rank == 3 ? x.size(2) % a.key_heads == 0 : x.size(1) == a.key_heads, argument, show(x),
          "[blocks, block size, H], [blocks, N, block size, D] or [blocks, N, D / 16, block size, 16]");
  require(rank < 5 || x.size(4) == 16, argument, show(x), "tiles of 16 columns");
  return rank == 3 ? x.size(2) / a.key_heads : rank == 4 ? x.size(3) : x.size(2) * 16;
}

// Positions in the signature: 24 arguments that every version has, then V3's, V4's and V5's, then the numbers.
template <int kVersion, class... Arguments>
Attention collect(const Arguments&... arguments) {
  const auto all = std::tie(arguments...);
  constexpr size_t n = kVersion == 2 ? 24 : kVersion == 3 ? 27 : kVersion == 4 ? 29 : 31;
  Attention a;
  a.query = std::get<0>(all);
  const auto &keys = std::get<1>(all), &values = std::get<2>(all);
  a.tensors = std::max(keys.size(), values.size());
  if (!keys.empty()) a.key = keys[0];
  if (!values.empty()) a.value = values[0];
  a.pse = std::get<3>(all);
  a.mask = std::get<4>(all);
  a.query_lengths = std::get<5>(all);
  a.key_lengths = std::get<6>(all);
  a.table = std::get<14>(all);
  a.not_emulated = {{"deqScale1", std::get<7>(all).defined()},
                    {"quantScale1", std::get<8>(all).defined()},
                    {"deqScale2", std::get<9>(all).defined()},
                    {"quantScale2", std::get<10>(all).defined()},
                    {"quantOffset2", std::get<11>(all).defined()},
                    {"antiquantScale", std::get<12>(all).defined()},
                    {"antiquantOffset", std::get<13>(all).defined()},
                    {"queryPaddingSize", std::get<15>(all).defined()},
                    {"kvPaddingSize", std::get<16>(all).defined()},
                    {"keyAntiquantScale", std::get<17>(all).defined()},
                    {"keyAntiquantOffset", std::get<18>(all).defined()},
                    {"valueAntiquantScale", std::get<19>(all).defined()},
                    {"valueAntiquantOffset", std::get<20>(all).defined()},
                    {"keySharedPrefix", std::get<21>(all).defined()},
                    {"valueSharedPrefix", std::get<22>(all).defined()},
                    {"actualSharedPrefixLen", std::get<23>(all).has_value()}};
  if constexpr (kVersion >= 3) {
    a.query_rope = std::get<24>(all);
    a.key_rope = std::get<25>(all);
  }
  if constexpr (kVersion >= 4) {
    a.not_emulated.emplace_back("dequantScaleQuery", std::get<27>(all).defined());
    a.sink = std::get<28>(all);
  }
  if constexpr (kVersion >= 5) {
    a.not_emulated.emplace_back("qStartIdx", std::get<29>(all).has_value());
    a.not_emulated.emplace_back("kvStartIdx", std::get<30>(all).has_value());
    a.not_emulated.emplace_back("pseType", std::get<n + 14>(all) != 0);
  }
  a.heads = std::get<n>(all);
  a.scale = std::get<n + 1>(all);
  // No sequence is longer than 32 bits say; more would overflow in sums with positions.
  const auto bounded = [](int64_t tokens) { return std::clamp<int64_t>(tokens, INT32_MIN, INT32_MAX); };
  a.before = bounded(std::get<n + 2>(all));
  a.after = bounded(std::get<n + 3>(all));
  a.layout = std::get<n + 4>(all);
  a.key_heads = std::get<n + 5>(all) ? std::get<n + 5>(all) : a.heads;
  a.sparse = std::get<n + 6>(all);
  a.precise = std::get<n + 7>(all);
  a.block = std::get<n + 8>(all);
  a.wants_lse = std::get<n + 10>(all);
  a.out = *std::get<sizeof...(Arguments) - 2>(all);
  a.lse = *std::get<sizeof...(Arguments) - 1>(all);
  return a;
}

template <class... Parameters>
struct List {};
template <class... A, class... B>
List<A..., B...> operator+(List<A...>, List<B...>);

template <int kVersion, class Parameters>
struct Kernel;
template <int kVersion, class... Parameters>
struct Kernel<kVersion, List<Parameters...>> {
  void operator()(Parameters... p) const {
    const auto all = std::tie(p...);
    run(collect<kVersion>(p...), std::get<sizeof...(p) - 2>(all), std::get<sizeof...(p) - 1>(all));
  }
};
template <int kVersion>
struct Check {
  template <class... Arguments>
  void operator()(const Arguments&... arguments) const {
    require_generation(kVersion == 5 ? kOnA5 : kOnA2 | kOnA3);
    check_attention(collect<kVersion>(arguments...));
  }
};

using Tensors = List<In, Ins, Ins, In, In, OptionalInts, OptionalInts, In, In, In, In, In, In, In, In, In, In, In, In,
                     In, In, In, In, OptionalInts>;
using Rotary = List<In, In, In>;
using Numbers =
    List<int64_t, double, int64_t, int64_t, Text, int64_t, int64_t, int64_t, int64_t, int64_t, bool, int64_t, int64_t>;
using Results = List<Out, Out>;
using V2 = decltype(Tensors() + Numbers() + Results());
using V3 = decltype(Tensors() + Rotary() + Numbers() + Results());
using V4 = decltype(Tensors() + Rotary() + List<In, In>() + Numbers() + List<int64_t>() + Results());
using V5 = decltype(Tensors() + Rotary() + List<In, In, OptionalInts, OptionalInts>() + Numbers() +
                    List<int64_t, int64_t>() + Results());

}  // namespace

at::Tensor heads_first(In x, const std::string& layout, int64_t heads) {
  if (layout == "BSH") return x.view({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "TND") return x.transpose(0, 1);
  return x;  // BNSD, NTD
}

Sizes sizes_of(const Attention& a) {
  Sizes s{};
  s.layout = find_layout(a.layout);
  const std::string layout = s.layout->query;
  const auto rank = static_cast<int64_t>(layout.size());
  s.tokens = layout == "TND" || layout == "NTD";
  s.paged = a.table.defined();
  require(a.heads > 0 && a.key_heads > 0, "numKeyValueHeads", std::to_string(a.key_heads), "more than 0");
  const auto fits = [&](In x, int64_t heads, const char* argument) {
    require(x.dim() == rank && (layout != "BSH" || x.size(2) % heads == 0), argument, show(x), "the layout's shape");
    const at::Tensor seen = heads_first(x, layout, heads);
    require(seen.size(-3) == heads, argument, show(x), "as many heads as numHeads or numKeyValueHeads");
    return seen;
  };
  const at::Tensor q = fits(a.query, a.heads, "query");
  s.batch = !s.tokens ? q.size(0) : a.query_lengths ? static_cast<int64_t>(a.query_lengths->size()) : 0;
  s.queries = q.size(-2);
  s.width = q.size(-1);
  s.form = !a.query_rope.defined() ? Form::kGrouped : s.width == 512 ? Form::kDecode : Form::kPrefill;
  int64_t key_width = 0;
  if (s.paged) {
    key_width = cache_width(a.key, a, "key");
    s.value_width = cache_width(a.value, a, "value");
    require(a.value.dim() == a.key.dim() && a.value.size(0) == a.key.size(0), "value", show(a.value),
            "the blocks of key");
    s.keys = a.table.size(1) * a.block;
  } else {
    const at::Tensor k = fits(a.key, a.key_heads, "key"), v = fits(a.value, a.key_heads, "value");
    require(s.tokens || k.size(0) == s.batch, "key", show(a.key), "as many sequences as query");
    require(
        v.sizes().slice(0, static_cast<size_t>(v.dim()) - 1) == k.sizes().slice(0, static_cast<size_t>(k.dim()) - 1),
        "value", show(a.value), "the shape of key (but for D)");
    key_width = k.size(-1);
    s.value_width = v.size(-1);
    s.keys = k.size(-2);
  }
  require(key_width == s.width, "key", show(a.key), "the head size of query");
  check_rope(a, s);
  return s;
}

std::pair<int64_t, int64_t> range(const std::optional<std::vector<int64_t>>& lengths, bool ends, int64_t all,
                                  int64_t b) {
  if (!lengths) return {0, all};
  const auto i = static_cast<size_t>(b);
  if (!ends) return {0, (*lengths)[lengths->size() == 1 ? 0 : i]};
  const int64_t start = i ? (*lengths)[i - 1] : 0;
  return {start, (*lengths)[i] - start};
}

std::pair<int64_t, int64_t> query_range(const Attention& a, const Sizes& s, int64_t b) {
  // A2 and A3: without effect when Q_S is 1.
  const bool ignored = !on_a5() && !s.tokens && s.queries == 1;
  return range(ignored ? std::nullopt : a.query_lengths, s.tokens, s.queries, b);
}

std::pair<int64_t, int64_t> key_range(const Attention& a, const Sizes& s, int64_t b) {
  return range(a.key_lengths, s.tokens && !s.paged, s.keys, b);
}

// V4: sparseMode, preTokens and nextTokens have no effect here.
bool ignores_sparse(const Attention& a, const Sizes& s) {
  const bool plain = a.layout == "BSH" || a.layout == "BSND" || a.layout == "BNSD";
  return !on_a5() && plain && s.queries == 1 && s.width == s.value_width && s.form == Form::kGrouped;
}

#define ATTENTION(VERSION)                                                                          \
  CHECKED(aclnnFusedInferAttentionScoreV##VERSION, Check<VERSION>{}, Kernel<VERSION, V##VERSION>{}) \
  SOFTNPU_C int aclnnFusedInferAttentionScoreV##VERSION##GetMaxWorkspaceSize()                      \
      __attribute__((ifunc("softnpu_phase1_aclnnFusedInferAttentionScoreV" #VERSION)))

ATTENTION(2);
ATTENTION(3);
ATTENTION(4);
ATTENTION(5);

}  // namespace softnpu::attention
