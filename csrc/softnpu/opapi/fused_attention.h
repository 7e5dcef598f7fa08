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

struct Attention {
  at::Tensor query, key, value, pse, mask, table, query_rope, key_rope, sink, out, lse;
  size_t tensors;  // in the lists of keys and values
  std::optional<std::vector<int64_t>> query_lengths, key_lengths;
  std::vector<std::pair<const char*, bool>> not_emulated;  // argument, given
  int64_t heads, key_heads, before, after, sparse, precise, block;
  double scale;
  std::string layout;
  bool wants_lse;
};

// Grouped: no rotary tensors. Decode: rotary tensors beside a head size of 512. Prefill: beside one of 128.
enum class Form { kGrouped, kPrefill, kDecode };

struct Sizes {
  const Layout* layout;
  Form form;
  bool tokens, paged;            // tokens: all sequences in one axis
  int64_t batch, queries, keys;  // of one sequence, or of all with `tokens`; keys: room in the cache when paged
  int64_t width, value_width;    // of a head
};

// [batch, heads, sequence, width], or [heads, tokens, width]; views.
at::Tensor heads_first(In x, const std::string& layout, int64_t heads);
Sizes sizes_of(const Attention& a);  // refuses what does not fit the layout
std::pair<int64_t, int64_t> query_range(const Attention& a, const Sizes& s, int64_t batch);  // start, length
std::pair<int64_t, int64_t> key_range(const Attention& a, const Sizes& s, int64_t batch);
bool ignores_sparse(const Attention& a, const Sizes& s);
void check_attention(const Attention& a);

}  // namespace softnpu::attention
