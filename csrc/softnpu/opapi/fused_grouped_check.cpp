// What grouped_matmul accepts beside its dtypes: lists, groups, shapes, alignment.
// mirror-cann ops-transformer: gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md, aclnnGroupedMatmulWeightNz.md
#include <sstream>

#include "fused_grouped.h"

namespace softnpu::grouped {

bool given(Ins list) { return !list.empty() && list[0].defined() && list[0].numel() > 0; }

void require_shape(const char* argument, In x, const Shapes& allowed) {
  std::string expected;
  for (const auto& shape : allowed) {
    if (x.sizes() == at::IntArrayRef(shape)) return;
    expected += expected.empty() ? "[" : " or [";
    for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + text(shape[i]);
    expected += "]";
  }
  refuse(argument, show(x), expected);
}

int64_t Grouped::rows() const {
  int64_t result = 0;
  for (const Matrix& one : x) result += one.size(0);
  return result;
}

int64_t Grouped::groups() const {
  if (weight.size() > 1 || type == -1) return static_cast<int64_t>(weight.size());
  if (type == 2) return list.size(0);
  return weight[0].dim() == 3 ? weight[0].size(0) : 1;
}

bool blockwise(const Grouped& c) {
  if (c.x[0].dtype != kE4M3 && c.x[0].dtype != kE5M2) return false;
  if (!given(c.scale) || !given(c.per_token)) return false;
  if (c.type == 0) return c.scale[0].dim() == 3;
  return c.scale[0].sizes() == at::IntArrayRef({c.depth() / 128 + c.groups(), ceil_div(c.columns(), 128)});
}

namespace {

void require_same_dtype(const char* argument, Ins list, size_t i) {
  require(list[i].defined() && list[i].scalar_type() == list[0].scalar_type(), argument, show(list[i]),
          "one dtype for all");
}

void check_numbers(const Grouped& c) {
  require(c.split >= 0 && c.split <= 3, "split_item", text(c.split), "0 to 3");
  require(c.type == -1 || c.type == 0 || c.type == 2, "group_type", text(c.type), "-1, 0 or 2");
  require(c.list_type >= 0 && c.list_type <= 2, "group_list_type", text(c.list_type), "0 to 2");
  require(c.act >= 0 && c.act <= 5 && c.act != 3, "act_type", text(c.act), "0, 1, 2, 4 or 5");
  const size_t most = on_a5() ? 1024 : 128;
  require(c.x.size() <= most && c.weight.size() <= most, "x", text(static_cast<int64_t>(c.x.size())) + " tensors",
          on_a5() ? "at most 1024 tensors" : "at most 128 tensors");
  if (c.tuning.empty()) return;
  require(!on_a5() || c.nz, "tuning_config", "a value", "nothing on this chip");
  // The document bounds every element; for the second (0 or 1) and third (-1 allowed) that contradicts itself.
  require(c.tuning[0] >= 0 && c.tuning[0] <= c.rows(), "tuning_config", text(c.tuning[0]), "0 to the rows of x");
}

void check_activation(const Grouped& c, const Form& form) {
  if (c.act == 0) return;
  // The NZ document of A2 and A3: other quantised forms only warn.
  if (!on_a5() && c.nz && form.kind != Kind::kPlain) return;
  const auto out = c.out[0]->scalar_type();
  const bool scaled = form.kind == Kind::kScaled && c.x[0].dtype == kI8 && (out == kBF16 || out == kF16) &&
                      given(c.scale) && (c.scale[0].scalar_type() == kF32 || c.scale[0].scalar_type() == kBF16);
  require(scaled, "act_type", text(c.act), "0: an activation needs int8 by int8 with an fp32 or bf16 scale");
}

// Which of several tensors go together, and how many groups there are at most.
void check_lists(const Grouped& c, const Form& form) {
  const bool one = c.x.size() == 1 && c.weight.size() == 1;
  const std::string counts =
      text(static_cast<int64_t>(c.x.size())) + " of x, " + text(static_cast<int64_t>(c.weight.size())) + " of weight";
  const unsigned axis = c.type == -1 ? kApart : c.type == 0 ? kRows : kDepth;
  require(form.axes & axis, "group_type", text(c.type), "a group type of this combination of dtypes");
  const bool several_weights = form.kind == Kind::kPlain || (form.kind == Kind::kMsd && !on_a5()) ||
                               (form.kind == Kind::kAntiquant && (c.type == -1 || !on_a5())) ||
                               (c.nz && on_a5() && (form.kind == Kind::kMx || form.kind == Kind::kMxW4));
  require(one || several_weights, "weight", counts, "one tensor for this combination of dtypes");
  require(c.x.size() == 1 || form.kind == Kind::kPlain || c.type == -1, "x", counts,
          "one tensor for this combination of dtypes");
  if (c.type == -1) {
    require(c.split < 2, "split_item", text(c.split), "0 or 1 without groups");
    require(!c.list.defined(), "group_list", show(c.list), "nothing without groups");
    require(c.x.size() == c.weight.size() && c.out.size() == c.x.size(), "weight", counts, "one for each x");
    return;
  }
  require(c.split >= 2, "split_item", text(c.split),
          c.type == 2 && c.weight.size() > 1 ? "2 or 3 (several weights grouped along K are not emulated)"
                                             : "2 or 3: one result");
  require(c.out.size() == 1, "out", text(static_cast<int64_t>(c.out.size())) + " tensors", "one");
  require(c.type == 0 || one, "weight", counts, "one x and one weight when grouped along K");
  require(c.x.size() == 1 || c.x.size() == c.weight.size(), "weight", counts, "one for each x");
  require(c.x.size() > 1 || c.list.defined(), "group_list", "nothing", "the groups");
  if (!c.list.defined()) return;
  check_table({{"group_list", true, {at::kLong}, 1, 2, Source::kDocument}}, {c.list});
  const int64_t most = one || on_a5() ? 1024 : 128;
  require(c.list.size(0) <= most, "group_list", show(c.list),
          one || on_a5() ? "at most 1024 groups" : "at most 128 groups");
  require(c.list.dim() == (c.list_type == 2 ? 2 : 1) && (c.list_type != 2 || c.list.size(1) == 2), "group_list",
          show(c.list), c.list_type == 2 ? "[groups, 2]" : "[groups]");
  require(c.list_type != 2 || !on_a5() || (c.type == 0 && form.kind != Kind::kPlain && form.kind != Kind::kAntiquant),
          "group_list_type", "2", "0 or 1 (2 is for rows of quantised x)");
  if (c.type == 0) require(c.list.size(0) == c.groups(), "group_list", show(c.list), "one group for each weight");
}

// Ranks, K and N, transposition and the limits of sizes.
void check_matrices(const Grouped& c, const Form& form) {
  const bool depth = c.type == 2;
  for (size_t i = 0; i < c.weight.size(); ++i) {
    const Matrix& w = c.weight[i];
    const Matrix& x = c.x[c.x.size() > 1 ? i : 0];
    const int64_t highest = c.type == -1 && form.kind == Kind::kAntiquant && on_a5() ? 6 : 2;
    require(x.dim() >= 2 && x.dim() <= highest, "x", show(x), highest == 2 ? "2 dimensions" : "2 to 6 dimensions");
    require(x.dtype == c.x[0].dtype, "x", show(x), "the dtype of the first x");
    require(w.dtype == c.weight[0].dtype, "weight", show(w), "the dtype of the first weight");
    require(w.dim() == (c.type == 0 && c.weight.size() == 1 && c.x.size() == 1 ? 3 : 2), "weight", show(w),
            c.type == 0 && c.weight.size() == 1 ? "[groups, K, N]" : "[K, N]");
    require(w.size(-2) == x.size(-1), "weight", show(w), "the last dimension of x as K");
    require(c.type == -1 || w.size(-1) == c.columns(), "weight", show(w), "the same N in each");
    require(w.transposed == c.weight[0].transposed, "weight", show(w), "all transposed or none");
    require(depth ? x.transposed || x.size(0) == 1 || x.size(1) == 1 : !x.transposed, "x", show(x),
            depth ? "a transposed tensor (stride 1 along M)" : "not transposed");
    require(!depth || !w.transposed, "weight", "a transposed tensor", "not transposed when grouped along K");
    if (!on_a5() && !c.nz) {
      require(x.size(x.transposed ? -2 : -1) < 65536, "x", show(x), "a last dimension below 65536");
      require(w.size(w.transposed ? -2 : -1) < 65536, "weight", show(w), "a last dimension below 65536");
    }
    require(!c.nz || (w.size(-1) > 1 && w.size(-2) > 1), "weight", show(w), "K and N above 1 in the NZ format");
    require(c.out[c.type == -1 ? i : 0]->size(-1) == w.size(-1), "out", show(*c.out[c.type == -1 ? i : 0]),
            "N columns");
  }
  if (c.type == 0) require_shape("out", *c.out[0], {{c.rows(), c.columns()}});
  if (depth) {
    require_shape("out", *c.out[0], {{c.groups(), c.x[0].size(0), c.columns()}});
    require(!given(c.bias), "bias", "a tensor", "nothing when grouped along K");
  }
}

// One tensor for all groups: [groups, shape...]; one for each weight: [shape...].
void check_each(const char* argument, Ins list, const Grouped& c, const std::vector<std::vector<int64_t>>& shapes) {
  if (!given(list)) return;
  require(list.size() == c.weight.size(), argument, text(static_cast<int64_t>(list.size())) + " tensors",
          "one for each weight");
  for (size_t i = 0; i < list.size(); ++i) {
    require_same_dtype(argument, list, i);
    Shapes allowed = shapes;
    if (c.weight[0].dim() == 3)
      for (auto& shape : allowed) shape.insert(shape.begin(), c.groups());
    require_shape(argument, list[i], allowed);
  }
}

bool same_order(In scale, bool transposed) {  // an MX scale lies in memory as its matrix does
  const int64_t n = scale.dim();
  if (scale.size(n - 2) == 1 || scale.size(n - 3) == 1) return true;
  const bool is = scale.stride(n - 1) == 1 && scale.stride(n - 3) == 2 && scale.stride(n - 2) == scale.size(n - 3) * 2;
  return is == transposed;
}

void check_mx(const Grouped& c) {
  const int64_t k = c.depth(), n = c.columns(), g = c.groups();
  if (c.type == 2) {
    require_shape("scale", c.scale[0], {{k / 64 + g, n, 2}});
    require_shape("per_token_scale", c.per_token[0], {{c.rows(), k / 64 + g, 2}});
  } else {
    check_each("scale", c.scale, c, {{ceil_div(k, 64), n, 2}});
    require_shape("per_token_scale", c.per_token[0], {{c.rows(), ceil_div(k, 64), 2}});
  }
  for (const at::Tensor& scale : c.scale)
    require(same_order(scale, c.weight[0].transposed), "scale", show(scale), "transposed as weight is");
  require(same_order(c.per_token[0], c.x[0].transposed), "per_token_scale", show(c.per_token[0]), "transposed as x is");
  if (c.x[0].dtype == kE2M1) {
    require(k % 2 == 0 && k != 2, "x", show(c.x[0]), "an even K that is not 2");
    require(c.weight[0].transposed || n % 2 == 0, "weight", show(c.weight[0]), "an even N");
  }
  require(c.weight.size() == 1 || !given(c.bias), "bias", "a tensor", "nothing beside several weights");
}

void check_scaled(const Grouped& c) {
  const int64_t k = c.depth(), n = c.columns(), g = c.groups(), m = c.rows();
  if (blockwise(c)) {
    if (c.type == 2) {
      require_shape("per_token_scale", c.per_token[0], {{m, k / 128 + g}});
    } else {
      require_shape("scale", c.scale[0], {{g, ceil_div(k, 128), ceil_div(n, 128)}});
      require_shape("per_token_scale", c.per_token[0], {{m, ceil_div(k, 128)}});
    }
    return;
  }
  if (given(c.scale)) {
    // One scale for a whole weight exists on A5 only, and not for an int8 result.
    const bool one = on_a5() && c.out[0]->scalar_type() != kI8;
    require_shape("scale", c.scale[0], one ? Shapes{{g, n}, {g, 1}, {g}} : Shapes{{g, n}});
  }
  if (!given(c.per_token)) return;
  const bool one = on_a5() && c.x[0].dtype != kI8;
  if (c.type == 2)
    require_shape("per_token_scale", c.per_token[0], {{g, m}, {g, 1}, {g}});
  else
    require_shape("per_token_scale", c.per_token[0], one ? Shapes{{m}, {g}, {g, 1}} : Shapes{{m}});
}

void check_msd(const Grouped& c) {
  const int64_t k = c.depth(), n = c.columns();
  const bool symmetric = !given(c.offset);
  require(!c.weight[0].transposed, "weight", "a transposed tensor", "not transposed");
  require(n % 8 == 0, "weight", show(c.weight[0]), "N a multiple of 8");
  if (symmetric) {
    require(c.list_type == 1, "group_list_type", text(c.list_type), "1 (the device reads counts whatever is said)");
    require(k % 256 == 0 && k <= 18432, "x", show(c.x[0]), "K a multiple of 256, at most 18432");
    // The device's own groups are of 256; one scale for the whole of K is used with them (our reading).
    check_each("scale", c.scale, c, {{k / 256, n}, {1, n}});
  } else {
    check_each("scale", c.scale, c, {{1, n}});
    check_each("offset", c.offset, c, {{1, n}});
  }
  require_shape("per_token_scale", c.per_token[0], {{c.rows()}});
}

void check_int4(const Grouped& c) {
  const int64_t k = c.depth(), n = c.columns(), g = c.groups();
  require(c.nz || !c.weight[0].transposed, "weight", "a transposed tensor", "not transposed (only in the NZ format)");
  require(c.nz || n % 8 == 0, "weight", show(c.weight[0]), "N a multiple of 8");
  const at::Tensor& scale = c.scale[0];
  require(scale.dim() == 2 || scale.dim() == 3, "scale", show(scale), "[groups, N] or [groups, G, N]");
  const int64_t parts = scale.dim() == 3 ? scale.size(1) : 1;
  require_shape("scale", scale, {{g, n}, {g, parts, n}});
  require(parts > 0 && k % parts == 0 && k / parts % 2 == 0, "scale", show(scale), "G that divides K into even parts");
  if (c.nz && c.weight[0].transposed)
    require(k % 64 == 0 && k / parts % 64 == 0 && n % 16 == 0, "weight", show(c.weight[0]),
            "K and K/G multiples of 64, N of 16");
  if (given(c.per_token)) require_shape("per_token_scale", c.per_token[0], {{c.rows()}});
}

void check_antiquant(const Grouped& c) {
  const at::ScalarType dtype = c.weight[0].dtype;
  const int64_t lead = c.weight[0].dim() == 3 ? 1 : 0;
  const auto each = [&c](const char* argument, Ins list) {
    require(list.size() == c.weight.size(), argument, text(static_cast<int64_t>(list.size())) + " tensors",
            "one for each weight");
  };
  each("antiquant_scale", c.antiquant_scale);
  if (given(c.antiquant_offset)) each("antiquant_offset", c.antiquant_offset);
  int64_t length = -1;
  for (size_t i = 0; i < c.weight.size(); ++i) {
    const Matrix& w = c.weight[i];
    const at::Tensor& scale = c.antiquant_scale[i];
    require_same_dtype("antiquant_scale", c.antiquant_scale, i);
    const int64_t k = w.size(-2), n = w.size(-1), g = c.groups();
    if (dtype == kE2M1) {
      require(!w.transposed, "weight", "a transposed tensor", "not transposed");
      require(k % 32 == 0 && n % 32 == 0, "weight", show(w), "K and N multiples of 32");
      require_shape("antiquant_scale", scale, {{g, k / 32, n}});
      continue;
    }
    const bool parted = scale.dim() == lead + 2;
    require(!parted || dtype == kI4, "antiquant_scale", show(scale), "one scale for each column");
    const int64_t parts = parted ? scale.size(lead) : 1;
    std::vector<int64_t> shape = {n};
    if (parted) shape.insert(shape.begin(), parts);
    if (lead) shape.insert(shape.begin(), g);
    require_shape("antiquant_scale", scale, {shape});
    require(parts > 0 && k % parts == 0, "antiquant_scale", show(scale), "parts that divide K");
    if (parted) {
      require(length < 0 || length == k / parts, "antiquant_scale", show(scale), "parts of one length in all");
      length = k / parts;
      require(!on_a5() || length == 32 || length == 64 || length == 128 || length == 256, "antiquant_scale",
              show(scale), "parts of 32, 64, 128 or 256");
      require(!w.transposed || length % 2 == 0, "antiquant_scale", show(scale), "parts of an even length");
    }
    if (given(c.antiquant_offset)) {
      require_same_dtype("antiquant_offset", c.antiquant_offset, i);
      require(on_a5() || !parted, "antiquant_offset", show(c.antiquant_offset[i]), "nothing beside scales of groups");
      require_shape("antiquant_offset", c.antiquant_offset[i], {shape});
    }
  }
  if (dtype == kI4)
    require(c.weight[0].size(c.weight[0].transposed ? -2 : -1) % 2 == 0, "weight", show(c.weight[0]),
            "an even last dimension");
  if (dtype == kE4M3 || dtype == kE5M2)
    require(c.weight[0].transposed, "weight", "a tensor that is not transposed", "a transposed one");
}

void check_mixed(const Grouped& c, const Form& form) {
  const int64_t k = c.depth(), n = c.columns(), g = c.groups();
  if (form.kind == Kind::kMxW4) {
    require(c.weight[0].transposed, "weight", "a tensor that is not transposed", "a transposed one");
    require(k % 64 == 0 && n % 32 == 0, "weight", show(c.weight[0]), "K a multiple of 64, N of 32");
    // The document's shape is that of the memory; a view in the order of weight is accepted too (our reading).
    check_each("antiquant_scale", c.antiquant_scale, c, {{n, k / 64, 2}, {k / 64, n, 2}});
    require_shape("per_token_scale", c.per_token[0], {{c.rows(), k / 64, 2}});
    return;
  }
  require(!c.weight[0].transposed, "weight", "a transposed tensor", "not transposed");
  const at::Tensor& scale = c.antiquant_scale[0];
  require(scale.dim() == 3 && scale.size(1) > 0, "antiquant_scale", show(scale), "[groups, K / group size, N]");
  const int64_t length = k / scale.size(1);
  require(length == 128 || length == 192 || length == 256 || length == 512, "antiquant_scale", show(scale),
          "groups of 128, 192, 256 or 512");
  require_shape("antiquant_scale", scale, {{g, k / length, n}});
  require_shape("scale", c.scale[0], {{g, n}});
  require_shape("per_token_scale", c.per_token[0], {{c.rows()}});
  require(k % 64 == 0 && n % 64 == 0, "weight", show(c.weight[0]), "K and N of whole 32 bytes");
}

}  // namespace

void check_grouped(const Grouped& c) {
  require(!c.x.empty() && c.x[0].defined(), "x", "nothing", "at least one tensor");
  require(!c.weight.empty() && c.weight[0].defined(), "weight", "nothing", "at least one tensor");
  require(!c.out.empty() && c.out[0], "out", "nothing", "at least one tensor");
  check_numbers(c);
  const Form& form = form_of(c);
  check_activation(c, form);
  check_lists(c, form);
  check_matrices(c, form);
  for (size_t i = 0; i < c.weight.size() && given(c.bias); ++i) {
    require(c.bias.size() == c.weight.size(), "bias", text(static_cast<int64_t>(c.bias.size())) + " tensors",
            "one for each weight");
    require_same_dtype("bias", c.bias, i);
    const int64_t n = c.weight[i].size(-1);
    require_shape("bias", c.bias[i], c.weight[0].dim() == 3 ? Shapes{{c.groups(), n}} : Shapes{{n}});
  }
  if (form.kind == Kind::kScaled) check_scaled(c);
  if (form.kind == Kind::kMx) check_mx(c);
  if (form.kind == Kind::kMsd) check_msd(c);
  if (form.kind == Kind::kInt4) check_int4(c);
  if (form.kind == Kind::kAntiquant) check_antiquant(c);
  if (form.kind == Kind::kMxW4 || form.kind == Kind::kKcg) check_mixed(c, form);
}

}  // namespace softnpu::grouped
