// What FusedInferAttentionScore accepts. Tables: argument, required, dtypes, ranks, source.
// Documents: attention/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md (A2, A3; V2 and V3 are the
// same with fewer arguments) and ...V5.md (Ascend 950), both of hicann/ops-transformer, the newest stored versions.
#include <algorithm>
#include <cstring>
#include <map>

#include "fused_attention.h"

namespace softnpu::attention {
namespace {

// kReading: the _NBSD layouts and TND_NTD are refused without rotary tensors on A2 and A3 too.
constexpr Layout kLayouts[] = {
    {"BSH", "BSH", "BSH", true, true},          {"BSND", "BSND", "BSND", true, true},
    {"BNSD", "BNSD", "BNSD", true, true},       {"TND", "TND", "TND", true, true},
    {"NTD", "NTD", "NTD", false, true},         {"NTD_TND", "NTD", "TND", false, true},
    {"BSH_BNSD", "BSH", "BNSD", false, true},   {"BSND_BNSD", "BSND", "BNSD", false, true},
    {"BNSD_BSND", "BNSD", "BSND", false, true}, {"BSH_NBSD", "BSH", "NBSD", true, false},
    {"BSND_NBSD", "BSND", "NBSD", true, false}, {"BNSD_NBSD", "BNSD", "NBSD", true, false},
    {"TND_NTD", "TND", "NTD", true, false},
};

bool is(const Sizes& s, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(),
                     [&](const char* name) { return std::strcmp(s.layout->name, name) == 0; });
}

void check_types(const Attention& a) {
  const Types halves = {kF16, kBF16};
  Types queries = {kF16, kBF16, at::kChar}, keys = {kF16, kBF16, at::kChar, at::kBits4x2, at::kInt};
  if (on_a5()) {
    queries.push_back(at::kFloat8_e4m3fn);
    keys.insert(keys.end(), {at::kFloat8_e4m3fn, at::kFloat4_e2m1fn_x2});
  }
  check_table({{"query", true, queries, 3, 4, kDocument},
               {"key", true, keys, 3, 5, kDocument},
               {"value", true, keys, 3, 5, kDocument},
               {"pseShift", false, halves, 4, 4, kDocument},
               {"attenMask", false, {at::kBool, at::kChar, at::kByte}, 2, 4, kDocument},
               {"blockTable", false, {at::kInt}, 2, 2, kDocument},
               {"queryRope", false, halves, 3, 4, kDocument},
               {"keyRope", false, halves, 3, 5, kDocument},
               {"learnableSink", false, halves, 1, 1, kDocument},
               {"attentionOut", true, queries, 3, 4, kDocument}},
              {a.query, a.key, a.value, a.pse, a.mask, a.table, a.query_rope, a.key_rope, a.sink, a.out});
  require(a.tensors == 1, "key", std::to_string(a.tensors) + " tensors", "one tensor (lists are not emulated)");
  for (const auto& [name, given] : a.not_emulated) require(!given, name, "a value", "nothing (not emulated)");
  require(a.query.scalar_type() == kF16 || a.query.scalar_type() == kBF16, "query", show(a.query),
          "fp16 or bf16 (quantised forms are not emulated)");
  const std::pair<const char*, at::Tensor> like_query[] = {
      {"key", a.key},          {"value", a.value},        {"pseShift", a.pse},    {"queryRope", a.query_rope},
      {"keyRope", a.key_rope}, {"learnableSink", a.sink}, {"attentionOut", a.out}};
  for (const auto& [name, x] : like_query)
    if (x.defined())
      require(x.scalar_type() == a.query.scalar_type(), name, show(x),
              "the dtype of query (quantised forms are not emulated)");
  const std::pair<const char*, at::Tensor> dense[] = {{"query", a.query},      {"key", a.key},
                                                      {"value", a.value},      {"pseShift", a.pse},
                                                      {"attenMask", a.mask},   {"queryRope", a.query_rope},
                                                      {"keyRope", a.key_rope}, {"learnableSink", a.sink}};
  for (const auto& [name, x] : dense)
    if (x.defined()) require(x.is_contiguous(), name, show(x) + " with strides", "a contiguous tensor");
}

void check_heads(const Attention& a, const Sizes& s) {
  require(
      s.form == Form::kDecode ? s.layout->decode : s.layout->others, "inputLayout", a.layout,
      "a layout of this form (BSH, BSND, BNSD, TND; _NBSD and TND_NTD with rotary tensors and D 512, others without)");
  require(a.heads % a.key_heads == 0, "numKeyValueHeads", text(a.key_heads), "a divisor of numHeads");
  require(s.batch <= 65536, "query", text(s.batch) + " sequences", "at most 65536");
  if (!on_a5()) require(a.heads <= 256, "numHeads", text(a.heads), "at most 256");
  if (s.form != Form::kDecode) return;
  require(a.key_heads == 1, "numKeyValueHeads", text(a.key_heads), "1 with a head size of 512");
  if (on_a5())
    require(a.heads <= 128 && (a.heads & (a.heads - 1)) == 0, "numHeads", text(a.heads),
            "1, 2, 4, 8, 16, 32, 64 or 128");
}

// Head sizes: equal, or 192 with values of 128 (rotary part included), and what the layout allows.
void check_widths(const Attention& a, const Sizes& s) {
  const bool equal = s.width == s.value_width, merged = s.width == 192 && s.value_width == 128;
  const std::string found = text(s.width) + " and " + text(s.value_width) + " in values";
  require(s.width <= 512 && s.value_width <= 512, "query", found, "a head size of at most 512");
  const bool any_layout = !is(s, {"NTD", "NTD_TND", "BSH_BNSD", "BSND_BNSD", "BNSD_BSND"});
  if (!equal && !merged) {
    require(on_a5() && any_layout && s.width <= 128 && s.value_width <= 128, "value", found,
            "the head size of query, or 128 beside 192 (Ascend 950: others up to 128, not with every layout)");
    require(s.form == Form::kGrouped && !a.pse.defined() && !a.sink.defined() && !a.wants_lse, "value", found,
            "the head size of query together with pseShift, rotary tensors, learnableSink or softmaxLse");
  }
  if (s.form != Form::kGrouped) {
    require(equal && (s.width == 128 || s.width == 512), "query", found, "head sizes 128 or 512 with queryRope");
  } else if (is(s, {"BSH_BNSD", "BSND_BNSD"}) || (on_a5() && is(s, {"NTD", "NTD_TND"}))) {
    require((equal && (s.width == 64 || s.width == 128)) || merged, "query", found, "64, 128, or 192 with 128");
  } else if (is(s, {"BNSD_BSND"})) {
    require(s.width % 16 == 0, "query", found, "a multiple of 16");
  } else if (s.tokens && !on_a5()) {
    const bool grouped = is(s, {"TND"}) && a.heads != a.key_heads && a.precise == 0 && equal && s.width <= 256;
    require((equal && (s.width == 64 || s.width == 128)) || merged || grouped, "query", found,
            "64, 128, or 192 with 128 (up to 256 in TND with fewer key heads and innerPrecise 0)");
  }
  if (!on_a5() && !s.tokens && s.queries > 1)
    require(s.width % 16 == 0 && s.value_width % 16 == 0, "query", found, "multiples of 16 when Q_S is not 1");
}

void check_ends(const std::vector<int64_t>& ends, int64_t tokens, const char* argument) {
  require(std::is_sorted(ends.begin(), ends.end()) && !ends.empty() && ends[0] >= 0, argument, "ends that fall",
          "ends that do not fall");
  // kReading: A2 and A3 say nothing about tokens behind the last sequence; accepted, their results are 0.
  require(on_a5() ? ends.back() == tokens : ends.back() <= tokens, argument, text(ends.back()),
          on_a5() ? "all tokens (T) as the last end" : "at most T as the last end");
}

void check_each(const std::vector<int64_t>& lengths, int64_t batch, int64_t most, const char* argument) {
  const auto count = static_cast<int64_t>(lengths.size());
  require(count == 1 || count >= batch, argument, text(count) + " values", "one, or one for each sequence");
  for (const int64_t length : lengths)
    require(length >= 0 && length <= most, argument, text(length), "0 to the length of the sequence axis");
}

void check_lengths(const Attention& a, const Sizes& s) {
  require(a.query_lengths || !s.tokens, "actualSeqLengths", "nothing", "the ends of the sequences");
  require(a.key_lengths || !(s.tokens || s.paged), "actualSeqLengthsKv", "nothing",
          "lengths (they are required with TND, NTD and blockTable)");
  if (s.tokens) {
    check_ends(*a.query_lengths, s.queries, "actualSeqLengths");
    require(a.key_lengths->size() == a.query_lengths->size(), "actualSeqLengthsKv",
            text(static_cast<int64_t>(a.key_lengths->size())) + " values", "as many as actualSeqLengths");
  } else if (a.query_lengths) {
    require(on_a5() || s.form != Form::kDecode, "actualSeqLengths", "a value", "nothing (head size 512 without TND)");
    check_each(*a.query_lengths, s.batch, s.queries, "actualSeqLengths");
  }
  if (!a.key_lengths) return;
  if (s.tokens && !s.paged)
    check_ends(*a.key_lengths, s.keys, "actualSeqLengthsKv");
  else
    check_each(*a.key_lengths, s.batch, s.keys, "actualSeqLengthsKv");
}

void check_paged(const Attention& a, const Sizes& s) {
  if (!s.paged) {
    require(on_a5() || s.form != Form::kDecode, "blockTable", "nothing", "a block table with a head size of 512");
    return;
  }
  require(a.table.numel() > 0 && a.table.size(0) == s.batch, "blockTable", show(a.table), "a row for each sequence");
  require(a.key.dim() != 3 || a.key.size(2) <= 65535, "key", show(a.key), "at most 65535 values a token");
  const bool wide = s.form != Form::kGrouped || (s.width == s.value_width && (s.width == 64 || s.width == 128)) ||
                    (s.tokens && !on_a5());
  const bool one = !s.tokens && s.queries == 1;
  const int64_t step = wide || one ? 16 : 128, most = wide || !one ? 1024 : 512;
  require(a.block % step == 0 && a.block <= most, "blockSize", text(a.block),
          step == 128   ? "a multiple of 128 up to 1024"
          : most == 512 ? "a multiple of 16 up to 512"
                        : "a multiple of 16 up to 1024");
  require(!on_a5() || s.width == s.value_width, "blockTable", show(a.table),
          "no blocks with values of another head size");
}

void check_full_mask(const Attention& a, const Sizes& s) {
  const int64_t rank = a.mask.dim(), keys = a.mask.size(-1);
  if (rank == 2 && on_a5()) refuse("attenMask", show(a.mask), "3 or 4 dimensions with sparseMode 0 and 1");
  if (rank == 2)
    require(is(s, {"BSH", "BSND", "BNSD", "BNSD_BSND"}) && s.form == Form::kGrouped && s.width == s.value_width,
            "attenMask", show(a.mask), "3 or 4 dimensions in this form");
  const bool rows = rank > 2 || s.queries > 1;  // else (B, KV_S)
  require(rank == 2 && rows ? true : a.mask.size(0) == 1 || a.mask.size(0) == s.batch, "attenMask", show(a.mask),
          "1 or B in front");
  require(rank < 4 || a.mask.size(1) == 1, "attenMask", show(a.mask), "1 in the second dimension");
  require(!rows || a.mask.size(-2) >= s.queries, "attenMask", show(a.mask), "a row for each query");
  require(keys >= s.keys, "attenMask", show(a.mask),
          "a column for each key (when paged: for all blocks of blockTable)");
}

void check_mask(const Attention& a, const Sizes& s) {
  require(a.sparse != 9 || on_a5(), "sparseMode", "9", "0 to 4 (tree masks are not emulated)");
  require(a.sparse >= 0 && a.sparse <= 4, "sparseMode", text(a.sparse), "0 to 4");
  require(a.precise >= 0 && a.precise <= 3, "innerPrecise", text(a.precise), "0 to 3");
  const bool ignored = ignores_sparse(a, s);
  if (s.form == Form::kDecode)
    require(ignored || a.sparse == 0 || a.sparse >= 3, "sparseMode", text(a.sparse),
            "0, 3 or 4 with a head size of 512");
  if (s.width != s.value_width && on_a5() && s.width != 192)
    require(a.sparse == 0 || a.sparse == 2 || a.sparse == 3, "sparseMode", text(a.sparse),
            "0, 2 or 3 with unequal head sizes");
  if (s.tokens && !on_a5() && s.form != Form::kDecode) {
    require(a.sparse == 0 || a.sparse >= 3, "sparseMode", text(a.sparse), "0, 3 or 4 with TND and NTD");
    require(a.sparse || !a.mask.defined(), "attenMask", show(a.mask), "nothing with sparseMode 0 and TND or NTD");
  }
  if (!a.mask.defined()) {
    require(ignored || a.sparse == 0, "attenMask", "nothing", "a mask with sparseMode 1 to 4");
    return;
  }
  if (a.sparse >= 2 && !ignored) {
    require(a.mask.numel() == 2048 * 2048 && a.mask.size(-1) == 2048 && a.mask.size(-2) == 2048, "attenMask",
            show(a.mask), "[2048, 2048] with sparseMode 2 to 4");
  } else {
    require(!s.tokens, "attenMask", show(a.mask), "a mask of 2048 with TND and NTD (others are not emulated)");
    check_full_mask(a, s);
  }
  if ((a.sparse == 0 || a.sparse == 4) && !ignored)
    require(a.before + a.after >= 0, "preTokens", text(a.before) + " and nextTokens " + text(a.after),
            "a sum of at least 0");
}

void check_precise(const Attention& a, const Sizes& s) {
  if (on_a5()) return;
  const bool known =
      s.form != Form::kGrouped || (s.width == s.value_width && (s.width == 64 || s.width == 128)) || s.width == 192;
  if (!s.tokens && s.queries == 1)
    require(a.precise < 2 || known, "innerPrecise", text(a.precise), "0 or 1 with Q_S 1 and this head size");
  if (s.tokens && s.form == Form::kGrouped)
    require(a.precise == 0 || (a.precise == 1 && a.heads == a.key_heads && a.query.scalar_type() == kF16),
            "innerPrecise", text(a.precise), "0 with TND and NTD (1 with fp16 and as many key heads)");
}

void check_extras(const Attention& a, const Sizes& s) {
  if (a.pse.defined()) {
    require(!s.tokens && s.form == Form::kGrouped, "pseShift", show(a.pse), "nothing with TND, NTD or rotary tensors");
    require((a.pse.size(0) == 1 || a.pse.size(0) == s.batch) && a.pse.size(1) == a.heads, "pseShift", show(a.pse),
            "[1 or B, N, Q_S, KV_S]");
    // kReading: one row for several queries is not explained, and refused.
    require(a.pse.size(2) >= s.queries && a.pse.size(3) >= s.keys, "pseShift", show(a.pse), "at least Q_S and KV_S");
  }
  if (a.sink.defined()) {
    require(a.sink.size(0) == a.heads, "learnableSink", show(a.sink), "a value for each head");
    require(s.form != Form::kDecode && (s.width == 64 || s.width == 128 || s.width == 192) &&
                (s.value_width == 64 || s.value_width == 128),
            "learnableSink", text(s.width) + " and " + text(s.value_width),
            "head sizes 64 or 128 (192 in query and key)");
    require(!a.pse.defined(), "learnableSink", show(a.sink), "nothing beside pseShift");
    require(!on_a5() || a.precise == 0, "innerPrecise", text(a.precise), "0 with learnableSink");
  }
  if (a.wants_lse && !on_a5() && s.form == Form::kDecode && s.tokens)
    refuse("softmaxLseFlag", "true", "false with TND and a head size of 512");
}

void check_results(const Attention& a, const Sizes& s) {
  const std::map<char, int64_t> size = {{'B', s.batch},   {'N', a.heads},       {'S', s.queries},
                                        {'T', s.queries}, {'D', s.value_width}, {'H', a.heads * s.value_width}};
  std::vector<int64_t> shape;
  for (const char* axis = s.layout->out; *axis; ++axis) shape.push_back(size.at(*axis));
  require(a.out.sizes() == shape, "attentionOut", show(a.out), "the axes of the layout, with the head size of value");
  if (!a.wants_lse) return;
  shape = s.tokens ? std::vector{s.queries, a.heads, int64_t{1}} : std::vector{s.batch, a.heads, s.queries, int64_t{1}};
  require(a.lse.defined() && a.lse.sizes() == shape && a.lse.scalar_type() == kF32, "softmaxLse", show(a.lse),
          "fp32 [B, N, Q_S, 1], or [T, N, 1]");
}

}  // namespace

const Layout* find_layout(const std::string& name) {
  const auto* found =
      std::find_if(std::begin(kLayouts), std::end(kLayouts), [&](const Layout& l) { return name == l.name; });
  if (found == std::end(kLayouts)) refuse("inputLayout", name, "a layout of the document");
  return found;
}

void check_attention(const Attention& a) {
  check_types(a);
  const Sizes s = sizes_of(a);
  if (a.query.numel() == 0 || a.key.numel() == 0) return;  // the document: no further checks
  check_heads(a, s);
  check_widths(a, s);
  check_paged(a, s);
  check_lengths(a, s);
  check_mask(a, s);
  check_precise(a, s);
  check_extras(a, s);
  check_results(a, s);
}

}  // namespace softnpu::attention
