// What FusedInferAttentionScore accepts. Tables: argument, its tensor, required, dtypes, ranks,
// source. Documents: attention/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md
// (A2, A3; V2 and V3 are the same with fewer arguments) and ...V5.md (Ascend 950), both of
// hicann/ops-transformer, the newest stored versions.
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

bool is(const Sizes& sizes, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(),
                     [&](const char* name) { return std::strcmp(sizes.layout->name, name) == 0; });
}

void check_not_emulated(const Attention& call) {
  const std::pair<const char*, at::Tensor> tensors[] = {
      {"deqScale1", call.deq_scale1},
      {"quantScale1", call.quant_scale1},
      {"deqScale2", call.deq_scale2},
      {"quantScale2", call.quant_scale2},
      {"quantOffset2", call.quant_offset2},
      {"antiquantScale", call.antiquant_scale},
      {"antiquantOffset", call.antiquant_offset},
      {"queryPaddingSize", call.query_padding},
      {"kvPaddingSize", call.kv_padding},
      {"keyAntiquantScale", call.key_antiquant_scale},
      {"keyAntiquantOffset", call.key_antiquant_offset},
      {"valueAntiquantScale", call.value_antiquant_scale},
      {"valueAntiquantOffset", call.value_antiquant_offset},
      {"keySharedPrefix", call.key_shared_prefix},
      {"valueSharedPrefix", call.value_shared_prefix}};
  const auto nothing = [](bool given, const char* name) {
    require(!given, name, "a value", "nothing (not emulated)");
  };
  for (const auto& [name, tensor] : tensors) nothing(tensor.defined(), name);
  nothing(call.shared_prefix_length.has_value(), "actualSharedPrefixLen");
  nothing(call.dequant_scale_query.defined(), "dequantScaleQuery");
  nothing(call.query_start.has_value(), "qStartIdx");
  nothing(call.key_start.has_value(), "kvStartIdx");
  nothing(call.pse_type != 0, "pseType");
}

void check_types(const Attention& call) {
  const Types halves = {kF16, kBF16};
  Types queries = {kF16, kBF16, at::kChar}, keys = {kF16, kBF16, at::kChar, at::kBits4x2, at::kInt};
  if (on_a5()) {
    queries.push_back(at::kFloat8_e4m3fn);
    keys.insert(keys.end(), {at::kFloat8_e4m3fn, at::kFloat4_e2m1fn_x2});
  }
  check_table({{"query", call.query, true, queries, 3, 4, kDocument},
               {"key", call.key, true, keys, 3, 5, kDocument},
               {"value", call.value, true, keys, 3, 5, kDocument},
               {"pseShift", call.pse, false, halves, 4, 4, kDocument},
               {"attenMask", call.mask, false, {at::kBool, at::kChar, at::kByte}, 2, 4, kDocument},
               {"blockTable", call.table, false, {at::kInt}, 2, 2, kDocument},
               {"queryRope", call.query_rope, false, halves, 3, 4, kDocument},
               {"keyRope", call.key_rope, false, halves, 3, 5, kDocument},
               {"learnableSink", call.sink, false, halves, 1, 1, kDocument},
               {"attentionOut", *call.out, true, queries, 3, 4, kDocument}});
  const size_t tensors = std::max(call.keys.size(), call.values.size());
  require(tensors == 1, "key", std::to_string(tensors) + " tensors",
          "one tensor (lists are not emulated)");
  check_not_emulated(call);
  require(call.query.scalar_type() == kF16 || call.query.scalar_type() == kBF16, "query",
          show(call.query), "fp16 or bf16 (quantised forms are not emulated)");
  const std::pair<const char*, at::Tensor> like_query[] = {
      {"key", call.key},          {"value", call.value},
      {"pseShift", call.pse},     {"queryRope", call.query_rope},
      {"keyRope", call.key_rope}, {"learnableSink", call.sink},
      {"attentionOut", *call.out}};
  for (const auto& [name, x] : like_query)
    if (x.defined())
      require(x.scalar_type() == call.query.scalar_type(), name, show(x),
              "the dtype of query (quantised forms are not emulated)");
  const std::pair<const char*, at::Tensor> dense[] = {
      {"query", call.query},      {"key", call.key},           {"value", call.value},
      {"pseShift", call.pse},     {"attenMask", call.mask},    {"queryRope", call.query_rope},
      {"keyRope", call.key_rope}, {"learnableSink", call.sink}};
  for (const auto& [name, x] : dense)
    if (x.defined())
      require(x.is_contiguous(), name, show(x) + " with strides", "a contiguous tensor");
}

void check_heads(const Attention& call, const Sizes& sizes) {
  require(sizes.form == Form::kDecode ? sizes.layout->decode : sizes.layout->others, "inputLayout",
          call.layout,
          "a layout of this form (BSH, BSND, BNSD, TND; _NBSD and TND_NTD with rotary tensors and "
          "D 512, others without)");
  require(call.heads % call.key_heads == 0, "numKeyValueHeads", text(call.key_heads),
          "a divisor of numHeads");
  require(sizes.batch <= 65536, "query", text(sizes.batch) + " sequences", "at most 65536");
  if (!on_a5()) require(call.heads <= 256, "numHeads", text(call.heads), "at most 256");
  if (sizes.form != Form::kDecode) return;
  require(call.key_heads == 1, "numKeyValueHeads", text(call.key_heads),
          "1 with a head size of 512");
  if (on_a5())
    require(call.heads <= 128 && (call.heads & (call.heads - 1)) == 0, "numHeads", text(call.heads),
            "1, 2, 4, 8, 16, 32, 64 or 128");
}

// Head sizes: equal, or 192 with values of 128 (rotary part included), and what the layout allows.
void check_widths(const Attention& call, const Sizes& sizes) {
  const bool equal = sizes.width == sizes.value_width,
             merged = sizes.width == 192 && sizes.value_width == 128;
  const std::string found = text(sizes.width) + " and " + text(sizes.value_width) + " in values";
  require(sizes.width <= 512 && sizes.value_width <= 512, "query", found,
          "a head size of at most 512");
  const bool any_layout = !is(sizes, {"NTD", "NTD_TND", "BSH_BNSD", "BSND_BNSD", "BNSD_BSND"});
  if (!equal && !merged) {
    require(on_a5() && any_layout && sizes.width <= 128 && sizes.value_width <= 128, "value", found,
            "the head size of query, or 128 beside 192 (Ascend 950: others up to 128, not with "
            "every layout)");
    require(sizes.form == Form::kGrouped && !call.pse.defined() && !call.sink.defined() &&
                !call.wants_lse,
            "value", found,
            "the head size of query together with pseShift, rotary tensors, learnableSink or "
            "softmaxLse");
  }
  if (sizes.form != Form::kGrouped) {
    require(equal && (sizes.width == 128 || sizes.width == 512), "query", found,
            "head sizes 128 or 512 with queryRope");
  } else if (is(sizes, {"BSH_BNSD", "BSND_BNSD"}) || (on_a5() && is(sizes, {"NTD", "NTD_TND"}))) {
    require((equal && (sizes.width == 64 || sizes.width == 128)) || merged, "query", found,
            "64, 128, or 192 with 128");
  } else if (is(sizes, {"BNSD_BSND"})) {
    require(sizes.width % 16 == 0, "query", found, "a multiple of 16");
  } else if (sizes.tokens && !on_a5()) {
    const bool grouped = is(sizes, {"TND"}) && call.heads != call.key_heads && call.precise == 0 &&
                         equal && sizes.width <= 256;
    require((equal && (sizes.width == 64 || sizes.width == 128)) || merged || grouped, "query",
            found,
            "64, 128, or 192 with 128 (up to 256 in TND with fewer key heads and innerPrecise 0)");
  }
  if (!on_a5() && !sizes.tokens && sizes.queries > 1)
    require(sizes.width % 16 == 0 && sizes.value_width % 16 == 0, "query", found,
            "multiples of 16 when Q_S is not 1");
}

void check_ends(const std::vector<int64_t>& ends, int64_t tokens, const char* argument) {
  require(std::is_sorted(ends.begin(), ends.end()) && !ends.empty() && ends[0] >= 0, argument,
          "ends that fall", "ends that do not fall");
  // kReading: A2 and A3 say nothing about tokens behind the last sequence; accepted, their results
  // are 0.
  require(on_a5() ? ends.back() == tokens : ends.back() <= tokens, argument, text(ends.back()),
          on_a5() ? "all tokens (T) as the last end" : "at most T as the last end");
}

void check_each(const std::vector<int64_t>& lengths, int64_t batch, int64_t most,
                const char* argument) {
  const auto count = static_cast<int64_t>(lengths.size());
  require(count == 1 || count >= batch, argument, text(count) + " values",
          "one, or one for each sequence");
  for (const int64_t length : lengths)
    require(length >= 0 && length <= most, argument, text(length),
            "0 to the length of the sequence axis");
}

void check_lengths(const Attention& call, const Sizes& sizes) {
  require(call.query_lengths || !sizes.tokens, "actualSeqLengths", "nothing",
          "the ends of the sequences");
  require(call.key_lengths || !(sizes.tokens || sizes.paged), "actualSeqLengthsKv", "nothing",
          "lengths (they are required with TND, NTD and blockTable)");
  if (sizes.tokens) {
    check_ends(*call.query_lengths, sizes.queries, "actualSeqLengths");
    require(call.key_lengths->size() == call.query_lengths->size(), "actualSeqLengthsKv",
            text(static_cast<int64_t>(call.key_lengths->size())) + " values",
            "as many as actualSeqLengths");
  } else if (call.query_lengths) {
    require(on_a5() || sizes.form != Form::kDecode, "actualSeqLengths", "a value",
            "nothing (head size 512 without TND)");
    // With one query in each sequence the page says that the lengths mean nothing.
    if (sizes.queries > 1)
      check_each(*call.query_lengths, sizes.batch, sizes.queries, "actualSeqLengths");
  }
  if (!call.key_lengths) return;
  if (sizes.tokens && !sizes.paged)
    check_ends(*call.key_lengths, sizes.keys, "actualSeqLengthsKv");
  else
    check_each(*call.key_lengths, sizes.batch, sizes.keys, "actualSeqLengthsKv");
}

void check_paged(const Attention& call, const Sizes& sizes) {
  if (!sizes.paged) {
    require(on_a5() || sizes.form != Form::kDecode, "blockTable", "nothing",
            "a block table with a head size of 512");
    return;
  }
  require(call.table.numel() > 0 && call.table.size(0) == sizes.batch, "blockTable",
          show(call.table), "a row for each sequence");
  require(call.key.dim() != 3 || call.key.size(2) <= 65535, "key", show(call.key),
          "at most 65535 values a token");
  const bool wide =
      sizes.form != Form::kGrouped ||
      (sizes.width == sizes.value_width && (sizes.width == 64 || sizes.width == 128)) ||
      (sizes.tokens && !on_a5());
  const bool one = !sizes.tokens && sizes.queries == 1;
  const int64_t step = wide || one ? 16 : 128, most = wide || !one ? 1024 : 512;
  require(call.block % step == 0 && call.block <= most, "blockSize", text(call.block),
          step == 128   ? "a multiple of 128 up to 1024"
          : most == 512 ? "a multiple of 16 up to 512"
                        : "a multiple of 16 up to 1024");
  require(!on_a5() || sizes.width == sizes.value_width, "blockTable", show(call.table),
          "no blocks with values of another head size");
}

void check_full_mask(const Attention& call, const Sizes& sizes) {
  const int64_t rank = call.mask.dim(), keys = call.mask.size(-1);
  if (rank == 2 && on_a5())
    refuse("attenMask", show(call.mask), "3 or 4 dimensions with sparseMode 0 and 1");
  if (rank == 2)
    require(is(sizes, {"BSH", "BSND", "BNSD", "BNSD_BSND"}) && sizes.form == Form::kGrouped &&
                sizes.width == sizes.value_width,
            "attenMask", show(call.mask), "3 or 4 dimensions in this form");
  const bool rows = rank > 2 || sizes.queries > 1;  // else (B, KV_S)
  require(rank == 2 && rows ? true : call.mask.size(0) == 1 || call.mask.size(0) == sizes.batch,
          "attenMask", show(call.mask), "1 or B in front");
  require(rank < 4 || call.mask.size(1) == 1, "attenMask", show(call.mask),
          "1 in the second dimension");
  require(!rows || call.mask.size(-2) >= sizes.queries, "attenMask", show(call.mask),
          "a row for each query");
  require(keys >= sizes.keys, "attenMask", show(call.mask),
          "a column for each key (when paged: for all blocks of blockTable)");
}

void check_mask(const Attention& call, const Sizes& sizes) {
  require(call.sparse != 9 || on_a5(), "sparseMode", "9", "0 to 4 (tree masks are not emulated)");
  require(call.sparse >= 0 && call.sparse <= 4, "sparseMode", text(call.sparse), "0 to 4");
  require(call.precise >= 0 && call.precise <= 3, "innerPrecise", text(call.precise), "0 to 3");
  const bool ignored = ignores_sparse(call, sizes);
  if (sizes.form == Form::kDecode)
    require(ignored || call.sparse == 0 || call.sparse >= 3, "sparseMode", text(call.sparse),
            "0, 3 or 4 with a head size of 512");
  if (sizes.width != sizes.value_width && on_a5() && sizes.width != 192)
    require(call.sparse == 0 || call.sparse == 2 || call.sparse == 3, "sparseMode",
            text(call.sparse), "0, 2 or 3 with unequal head sizes");
  if (sizes.tokens && !on_a5() && sizes.form != Form::kDecode) {
    require(call.sparse == 0 || call.sparse >= 3, "sparseMode", text(call.sparse),
            "0, 3 or 4 with TND and NTD");
    require(call.sparse || !call.mask.defined(), "attenMask", show(call.mask),
            "nothing with sparseMode 0 and TND or NTD");
  }
  if (!call.mask.defined()) {
    require(ignored || call.sparse == 0, "attenMask", "nothing", "a mask with sparseMode 1 to 4");
    return;
  }
  if (call.sparse >= 2 && !ignored) {
    require(call.mask.numel() == 2048 * 2048 && call.mask.size(-1) == 2048 &&
                call.mask.size(-2) == 2048,
            "attenMask", show(call.mask), "[2048, 2048] with sparseMode 2 to 4");
  } else {
    require(!sizes.tokens, "attenMask", show(call.mask),
            "a mask of 2048 with TND and NTD (others are not emulated)");
    check_full_mask(call, sizes);
  }
  if ((call.sparse == 0 || call.sparse == 4) && !ignored)
    require(call.before + call.after >= 0, "preTokens",
            text(call.before) + " and nextTokens " + text(call.after), "a sum of at least 0");
}

void check_precise(const Attention& call, const Sizes& sizes) {
  if (on_a5()) return;
  const bool known =
      sizes.form != Form::kGrouped ||
      (sizes.width == sizes.value_width && (sizes.width == 64 || sizes.width == 128)) ||
      sizes.width == 192;
  if (!sizes.tokens && sizes.queries == 1)
    require(call.precise < 2 || known, "innerPrecise", text(call.precise),
            "0 or 1 with Q_S 1 and this head size");
  if (sizes.tokens && sizes.form == Form::kGrouped)
    require(call.precise == 0 || (call.precise == 1 && call.heads == call.key_heads &&
                                  call.query.scalar_type() == kF16),
            "innerPrecise", text(call.precise),
            "0 with TND and NTD (1 with fp16 and as many key heads)");
}

void check_extras(const Attention& call, const Sizes& sizes) {
  if (call.pse.defined()) {
    require(!sizes.tokens && sizes.form == Form::kGrouped, "pseShift", show(call.pse),
            "nothing with TND, NTD or rotary tensors");
    require((call.pse.size(0) == 1 || call.pse.size(0) == sizes.batch) &&
                call.pse.size(1) == call.heads,
            "pseShift", show(call.pse), "[1 or B, N, Q_S, KV_S]");
    // kReading: one row for several queries is not explained, and refused.
    require(call.pse.size(2) >= sizes.queries && call.pse.size(3) >= sizes.keys, "pseShift",
            show(call.pse), "at least Q_S and KV_S");
  }
  if (call.sink.defined()) {
    require(call.sink.size(0) == call.heads, "learnableSink", show(call.sink),
            "a value for each head");
    require(sizes.form != Form::kDecode &&
                (sizes.width == 64 || sizes.width == 128 || sizes.width == 192) &&
                (sizes.value_width == 64 || sizes.value_width == 128),
            "learnableSink", text(sizes.width) + " and " + text(sizes.value_width),
            "head sizes 64 or 128 (192 in query and key)");
    require(!call.pse.defined(), "learnableSink", show(call.sink), "nothing beside pseShift");
    require(!on_a5() || call.precise == 0, "innerPrecise", text(call.precise),
            "0 with learnableSink");
  }
  if (call.wants_lse && !on_a5() && sizes.form == Form::kDecode && sizes.tokens)
    refuse("softmaxLseFlag", "true", "false with TND and a head size of 512");
}

void check_results(const Attention& call, const Sizes& sizes) {
  const std::map<char, int64_t> size = {
      {'B', sizes.batch},   {'N', call.heads},        {'S', sizes.queries},
      {'T', sizes.queries}, {'D', sizes.value_width}, {'H', call.heads * sizes.value_width}};
  std::vector<int64_t> shape;
  for (const char* axis = sizes.layout->out; *axis; ++axis) shape.push_back(size.at(*axis));
  require(call.out->sizes() == shape, "attentionOut", show(*call.out),
          "the axes of the layout, with the head size of value");
  if (!call.wants_lse) return;
  shape = sizes.tokens ? std::vector{sizes.queries, call.heads, int64_t{1}}
                       : std::vector{sizes.batch, call.heads, sizes.queries, int64_t{1}};
  require(call.lse && call.lse->sizes() == shape && call.lse->scalar_type() == kF32, "softmaxLse",
          show(*call.lse), "fp32 [B, N, Q_S, 1], or [T, N, 1]");
}

}  // namespace

const Layout* find_layout(const std::string& name) {
  const auto* found = std::find_if(std::begin(kLayouts), std::end(kLayouts),
                                   [&](const Layout& l) { return name == l.name; });
  if (found == std::end(kLayouts)) refuse("inputLayout", name, "a layout of the document");
  return found;
}

void check_attention(const Attention& call) {
  check_types(call);
  const Sizes sizes = sizes_of(call);
  if (call.query.numel() == 0 || call.key.numel() == 0) return;  // the document: no further checks
  check_heads(call, sizes);
  check_widths(call, sizes);
  check_paged(call, sizes);
  check_lengths(call, sizes);
  check_mask(call, sizes);
  check_precise(call, sizes);
  check_extras(call, sizes);
  check_results(call, sizes);
}

}  // namespace softnpu::attention
