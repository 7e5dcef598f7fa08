// FusedInferAttentionScore: one call of any of its versions, and its sizes whatever the layout.
#pragma once

#include "check.h"

namespace softnpu::attention {

struct Layout {
  const char* name;
  const char* query;  // of query, and of key and value unless they are paged
  const char* out;
  bool decode, others;  // the forms (below) that have it
};

const Layout* find_layout(const std::string& name);

struct Arguments {  // of all versions
  at::Tensor query, pse, mask, deq_scale1, quant_scale1, deq_scale2, quant_scale2, quant_offset2,
      antiquant_scale, antiquant_offset, table, query_padding, kv_padding, key_antiquant_scale,
      key_antiquant_offset, value_antiquant_scale, value_antiquant_offset, key_shared_prefix,
      value_shared_prefix, query_rope, key_rope, key_rope_antiquant_scale, dequant_scale_query,
      sink;
  std::vector<at::Tensor> keys, values;
  at::Tensor one_key, one_value;  // of PromptFlashAttention, which has no lists
  std::optional<std::vector<int64_t>> query_lengths, key_lengths, shared_prefix_length, query_start,
      key_start;
  int64_t heads, key_heads, before, after, sparse, precise, block, antiquant_mode,
      key_antiquant_mode, value_antiquant_mode, query_quant_mode, pse_type;
  double scale;
  std::string layout;
  bool wants_lse;
  Out out, lse;

  FIELDS(tensors, query, keys, values, pse, mask, query_lengths, key_lengths, deq_scale1,
         quant_scale1, deq_scale2, quant_scale2, quant_offset2, antiquant_scale, antiquant_offset,
         table, query_padding, kv_padding, key_antiquant_scale, key_antiquant_offset,
         value_antiquant_scale, value_antiquant_offset, key_shared_prefix, value_shared_prefix,
         shared_prefix_length)
  FIELDS(rotary, query_rope, key_rope, key_rope_antiquant_scale)
  FIELDS(from_v4, dequant_scale_query, sink)
  FIELDS(starts, query_start, key_start)
  FIELDS(numbers, heads, scale, before, after, layout, key_heads, sparse, precise, block,
         antiquant_mode, wants_lse, key_antiquant_mode, value_antiquant_mode)
  FIELDS(quant_mode, query_quant_mode)
  FIELDS(shift_type, pse_type)
  FIELDS(results, out, lse)
  FIELDS(incremental, query, keys, values, pse, mask, key_lengths, deq_scale1, quant_scale1,
         deq_scale2, quant_scale2, quant_offset2, antiquant_scale, antiquant_offset, table,
         kv_padding, heads, scale, layout, key_heads, block, precise, out)
  FIELDS(prompt, query, one_key, one_value, pse, mask, query_lengths, key_lengths, deq_scale1,
         quant_scale1, deq_scale2, quant_scale2, quant_offset2, heads, scale, before, after, layout,
         key_heads, sparse, precise, out)
  auto v2() { return tensors() + numbers() + results(); }
  auto v3() { return tensors() + rotary() + numbers() + results(); }
  auto v4() { return tensors() + rotary() + from_v4() + numbers() + quant_mode() + results(); }
  auto v5() {
    return tensors() + rotary() + from_v4() + starts() + numbers() + quant_mode() + shift_type() +
           results();
  }
  void check_a23() const;
  void check_a5() const;
  void check_incremental() const;
  void check_prompt() const;
  void run() const;
  void run_incremental() const;
  void run_prompt() const;

 private:
  Arguments of_one_query() const;
  Arguments of_prompt() const;
};

struct Attention : Arguments {
  at::Tensor key, value;  // the first of their lists
  explicit Attention(const Arguments& arguments);
};

// Grouped: no rotary tensors. Decode: rotary tensors beside a head size of 512. Prefill: beside one
// of 128.
enum class Form { kGrouped, kPrefill, kDecode };

struct Sizes {
  const Layout* layout;
  Form form;
  bool tokens, paged;  // tokens: all sequences in one axis
  int64_t batch, queries,
      keys;  // of one sequence, or of all with `tokens`; keys: room in the cache when paged
  int64_t width, value_width;  // of a head
};

// [batch, heads, sequence, width], or [heads, tokens, width]; views.
at::Tensor heads_first(In x, const std::string& layout, int64_t heads);
Sizes sizes_of(const Attention& call);  // refuses what does not fit the layout
std::pair<int64_t, int64_t> query_range(const Attention& call, const Sizes& sizes,
                                        int64_t batch);  // start, length
std::pair<int64_t, int64_t> key_range(const Attention& call, const Sizes& sizes, int64_t batch);
bool ignores_sparse(const Attention& call, const Sizes& sizes);
void check_attention(const Attention& call);

}  // namespace softnpu::attention
