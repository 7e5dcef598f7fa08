// What grouped_matmul accepts beside its dtypes: lists, groups, shapes, alignment.
// mirror-cann ops-transformer: gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md,
// aclnnGroupedMatmulWeightNz.md
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

bool blockwise(const Grouped& call) {
  if (call.x[0].dtype != kE4M3 && call.x[0].dtype != kE5M2) return false;
  if (!given(call.scale) || !given(call.per_token)) return false;
  if (call.type == 0) return call.scale[0].dim() == 3;
  return call.scale[0].sizes() ==
         at::IntArrayRef({call.depth() / 128 + call.groups(), ceil_div(call.columns(), 128)});
}

namespace {

void require_same_dtype(const char* argument, Ins list, size_t i) {
  require(list[i].defined() && list[i].scalar_type() == list[0].scalar_type(), argument,
          show(list[i]), "one dtype for all");
}

void check_numbers(const Grouped& call) {
  require(call.split >= 0 && call.split <= 3, "split_item", text(call.split), "0 to 3");
  require(call.type == -1 || call.type == 0 || call.type == 2, "group_type", text(call.type),
          "-1, 0 or 2");
  require(call.list_type >= 0 && call.list_type <= 2, "group_list_type", text(call.list_type),
          "0 to 2");
  require(call.act >= 0 && call.act <= 5 && call.act != 3, "act_type", text(call.act),
          "0, 1, 2, 4 or 5");
  const size_t most = on_a5() ? 1024 : 128;
  require(call.x.size() <= most && call.weight.size() <= most, "x",
          text(static_cast<int64_t>(call.x.size())) + " tensors",
          on_a5() ? "at most 1024 tensors" : "at most 128 tensors");
  if (call.tuning.empty()) return;
  require(!on_a5() || call.nz(), "tuning_config", "a value", "nothing on this chip");
  // The document bounds every element; for the second (0 or 1) and third (-1 allowed) that
  // contradicts itself.
  require(call.tuning[0] >= 0 && call.tuning[0] <= call.rows(), "tuning_config",
          text(call.tuning[0]), "0 to the rows of x");
}

void check_activation(const Grouped& call, const Form& form) {
  if (call.act == 0) return;
  // The NZ document of A2 and A3: other quantised forms only warn.
  if (!on_a5() && call.nz() && form.kind != Kind::kPlain) return;
  const auto out = call.out[0]->scalar_type();
  const bool scaled = form.kind == Kind::kScaled && call.x[0].dtype == kI8 &&
                      (out == kBF16 || out == kF16) && given(call.scale) &&
                      (call.scale[0].scalar_type() == kF32 || call.scale[0].scalar_type() == kBF16);
  require(scaled, "act_type", text(call.act),
          "0: an activation needs int8 by int8 with an fp32 or bf16 scale");
}

// Which of several tensors go together, and how many groups there are at most.
void check_lists(const Grouped& call, const Form& form) {
  const bool one = call.x.size() == 1 && call.weight.size() == 1;
  const std::string counts = text(static_cast<int64_t>(call.x.size())) + " of x, " +
                             text(static_cast<int64_t>(call.weight.size())) + " of weight";
  const unsigned axis = call.type == -1 ? kApart : call.type == 0 ? kRows : kDepth;
  require(form.axes & axis, "group_type", text(call.type),
          "a group type of this combination of dtypes");
  const bool several_weights =
      form.kind == Kind::kPlain || (form.kind == Kind::kMsd && !on_a5()) ||
      (form.kind == Kind::kAntiquant && (call.type == -1 || !on_a5())) ||
      (!on_a5() && call.type == 0 && call.x.size() == 1) ||  // one x, several weights, one out
      (call.nz() && on_a5() && (form.kind == Kind::kMx || form.kind == Kind::kMxW4));
  require(one || several_weights, "weight", counts, "one tensor for this combination of dtypes");
  require(call.x.size() == 1 || form.kind == Kind::kPlain || call.type == -1, "x", counts,
          "one tensor for this combination of dtypes");
  if (call.type == -1) {
    require(call.split < 2, "split_item", text(call.split), "0 or 1 without groups");
    require(!call.list.defined(), "group_list", show(call.list), "nothing without groups");
    require(call.x.size() == call.weight.size() && call.out.size() == call.x.size(), "weight",
            counts, "one for each x");
    return;
  }
  require(call.split >= 2, "split_item", text(call.split),
          call.type == 2 && call.weight.size() > 1
              ? "2 or 3 (several weights grouped along K are not emulated)"
              : "2 or 3: one result");
  require(call.out.size() == 1, "out", text(static_cast<int64_t>(call.out.size())) + " tensors",
          "one");
  require(call.type == 0 || one, "weight", counts, "one x and one weight when grouped along K");
  require(call.x.size() == 1 || call.x.size() == call.weight.size(), "weight", counts,
          "one for each x");
  require(call.x.size() > 1 || call.list.defined(), "group_list", "nothing", "the groups");
  if (!call.list.defined()) return;
  check_table({{"group_list", call.list, true, {at::kLong}, 1, 2, Source::kDocument}});
  const int64_t most = one || on_a5() ? 1024 : 128;
  require(call.list.size(0) <= most, "group_list", show(call.list),
          one || on_a5() ? "at most 1024 groups" : "at most 128 groups");
  require(call.list.dim() == (call.list_type == 2 ? 2 : 1) &&
              (call.list_type != 2 || call.list.size(1) == 2),
          "group_list", show(call.list), call.list_type == 2 ? "[groups, 2]" : "[groups]");
  require(call.list_type != 2 || !on_a5() ||
              (call.type == 0 && form.kind != Kind::kPlain && form.kind != Kind::kAntiquant),
          "group_list_type", "2", "0 or 1 (2 is for rows of quantised x)");
  if (call.type == 0)
    require(call.list.size(0) == call.groups(), "group_list", show(call.list),
            "one group for each weight");
}

// Ranks, K and N, transposition and the limits of sizes.
void check_matrices(const Grouped& call, const Form& form) {
  const bool depth = call.type == 2;
  for (size_t i = 0; i < call.weight.size(); ++i) {
    const Matrix& w = call.weight[i];
    const Matrix& x = call.x[call.x.size() > 1 ? i : 0];
    const int64_t highest = call.type == -1 && form.kind == Kind::kAntiquant && on_a5() ? 6 : 2;
    require(x.dim() >= 2 && x.dim() <= highest, "x", show(x),
            highest == 2 ? "2 dimensions" : "2 to 6 dimensions");
    require(x.dtype == call.x[0].dtype, "x", show(x), "the dtype of the first x");
    require(w.dtype == call.weight[0].dtype, "weight", show(w), "the dtype of the first weight");
    require(w.dim() == (call.type == 0 && call.weight.size() == 1 && call.x.size() == 1 ? 3 : 2),
            "weight", show(w),
            call.type == 0 && call.weight.size() == 1 ? "[groups, K, N]" : "[K, N]");
    require(w.size(-2) == x.size(-1), "weight", show(w), "the last dimension of x as K");
    require(call.type == -1 || w.size(-1) == call.columns(), "weight", show(w),
            "the same N in each");
    require(w.transposed == call.weight[0].transposed, "weight", show(w), "all transposed or none");
    require(depth ? x.transposed || x.size(0) == 1 || x.size(1) == 1 : !x.transposed, "x", show(x),
            depth ? "a transposed tensor (stride 1 along M)" : "not transposed");
    require(!depth || !w.transposed, "weight", "a transposed tensor",
            "not transposed when grouped along K");
    if (!on_a5() && !call.nz()) {
      require(x.size(x.transposed ? -2 : -1) < 65536, "x", show(x), "a last dimension below 65536");
      require(w.size(w.transposed ? -2 : -1) < 65536, "weight", show(w),
              "a last dimension below 65536");
    }
    require(!call.nz() || (w.size(-1) > 1 && w.size(-2) > 1), "weight", show(w),
            "K and N above 1 in the NZ format");
    require(call.out[call.type == -1 ? i : 0]->size(-1) == w.size(-1), "out",
            show(*call.out[call.type == -1 ? i : 0]), "N columns");
  }
  if (call.type == 0) require_shape("out", *call.out[0], {{call.rows(), call.columns()}});
  if (depth) {
    require_shape("out", *call.out[0], {{call.groups(), call.x[0].size(0), call.columns()}});
    require(!given(call.bias), "bias", "a tensor", "nothing when grouped along K");
  }
}

// One tensor for all groups: [groups, shape...]; one for each weight: [shape...].
void check_each(const char* argument, Ins list, const Grouped& call,
                const std::vector<std::vector<int64_t>>& shapes) {
  if (!given(list)) return;
  require(list.size() == call.weight.size(), argument,
          text(static_cast<int64_t>(list.size())) + " tensors", "one for each weight");
  for (size_t i = 0; i < list.size(); ++i) {
    require_same_dtype(argument, list, i);
    Shapes allowed = shapes;
    if (call.weight[0].dim() == 3)
      for (auto& shape : allowed) shape.insert(shape.begin(), call.groups());
    require_shape(argument, list[i], allowed);
  }
}

bool same_order(In scale, bool transposed) {  // an MX scale lies in memory as its matrix does
  const int64_t n = scale.dim();
  if (scale.size(n - 2) == 1 || scale.size(n - 3) == 1) return true;
  const bool is = scale.stride(n - 1) == 1 && scale.stride(n - 3) == 2 &&
                  scale.stride(n - 2) == scale.size(n - 3) * 2;
  return is == transposed;
}

void check_mx(const Grouped& call) {
  const int64_t k = call.depth(), n = call.columns(), g = call.groups();
  if (call.type == 2) {
    require_shape("scale", call.scale[0], {{k / 64 + g, n, 2}});
    require_shape("per_token_scale", call.per_token[0], {{call.rows(), k / 64 + g, 2}});
  } else {
    check_each("scale", call.scale, call, {{ceil_div(k, 64), n, 2}});
    require_shape("per_token_scale", call.per_token[0], {{call.rows(), ceil_div(k, 64), 2}});
  }
  for (const at::Tensor& scale : call.scale)
    require(same_order(scale, call.weight[0].transposed), "scale", show(scale),
            "transposed as weight is");
  require(same_order(call.per_token[0], call.x[0].transposed), "per_token_scale",
          show(call.per_token[0]), "transposed as x is");
  if (call.x[0].dtype == kE2M1) {
    require(k % 2 == 0 && k != 2, "x", show(call.x[0]), "an even K that is not 2");
    require(call.weight[0].transposed || n % 2 == 0, "weight", show(call.weight[0]), "an even N");
  }
  require(call.weight.size() == 1 || !given(call.bias), "bias", "a tensor",
          "nothing beside several weights");
}

void check_scaled(const Grouped& call) {
  const int64_t k = call.depth(), n = call.columns(), g = call.groups(), m = call.rows();
  if (blockwise(call)) {
    if (call.type == 2) {
      require_shape("per_token_scale", call.per_token[0], {{m, k / 128 + g}});
    } else {
      require_shape("scale", call.scale[0], {{g, ceil_div(k, 128), ceil_div(n, 128)}});
      require_shape("per_token_scale", call.per_token[0], {{m, ceil_div(k, 128)}});
    }
    return;
  }
  if (given(call.scale)) {
    // One scale for a whole weight exists on A5 only, and not for an int8 result.
    const bool one = on_a5() && call.out[0]->scalar_type() != kI8;
    if (call.weight.size() > 1)
      check_each("scale", call.scale, call, {{n}});
    else
      require_shape("scale", call.scale[0], one ? Shapes{{g, n}, {g, 1}, {g}} : Shapes{{g, n}});
  }
  if (!given(call.per_token)) return;
  const bool one = on_a5() && call.x[0].dtype != kI8;
  if (call.type == 2)
    require_shape("per_token_scale", call.per_token[0], {{g, m}, {g, 1}, {g}});
  else
    require_shape("per_token_scale", call.per_token[0],
                  one ? Shapes{{m}, {g}, {g, 1}} : Shapes{{m}});
}

void check_msd(const Grouped& call) {
  const int64_t k = call.depth(), n = call.columns();
  const bool symmetric = !given(call.offset);
  require(!call.weight[0].transposed, "weight", "a transposed tensor", "not transposed");
  require(n % 8 == 0, "weight", show(call.weight[0]), "N a multiple of 8");
  if (symmetric) {
    require(call.list_type == 1, "group_list_type", text(call.list_type),
            "1 (the device reads counts whatever is said)");
    require(k % 256 == 0 && k <= 18432, "x", show(call.x[0]), "K a multiple of 256, at most 18432");
    // The device's own groups are of 256; one scale for the whole of K is used with them (our
    // reading).
    check_each("scale", call.scale, call, {{k / 256, n}, {1, n}});
  } else {
    check_each("scale", call.scale, call, {{1, n}});
    check_each("offset", call.offset, call, {{1, n}});
  }
  require_shape("per_token_scale", call.per_token[0], {{call.rows()}});
}

void check_int4(const Grouped& call) {
  const int64_t k = call.depth(), n = call.columns(), g = call.groups();
  require(call.nz() || !call.weight[0].transposed, "weight", "a transposed tensor",
          "not transposed (only in the NZ format)");
  require(call.nz() || n % 8 == 0, "weight", show(call.weight[0]), "N a multiple of 8");
  const at::Tensor& scale = call.scale[0];
  require(scale.dim() == 2 || scale.dim() == 3, "scale", show(scale),
          "[groups, N] or [groups, G, N]");
  const int64_t parts = scale.dim() == 3 ? scale.size(1) : 1;
  require_shape("scale", scale, {{g, n}, {g, parts, n}});
  require(parts > 0 && k % parts == 0 && k / parts % 2 == 0, "scale", show(scale),
          "G that divides K into even parts");
  if (call.nz() && call.weight[0].transposed)
    require(k % 64 == 0 && k / parts % 64 == 0 && n % 16 == 0, "weight", show(call.weight[0]),
            "K and K/G multiples of 64, N of 16");
  if (given(call.per_token)) require_shape("per_token_scale", call.per_token[0], {{call.rows()}});
}

void check_antiquant(const Grouped& call) {
  const at::ScalarType dtype = call.weight[0].dtype;
  const int64_t lead = call.weight[0].dim() == 3 ? 1 : 0;
  const auto each = [&call](const char* argument, Ins list) {
    require(list.size() == call.weight.size(), argument,
            text(static_cast<int64_t>(list.size())) + " tensors", "one for each weight");
  };
  each("antiquant_scale", call.antiquant_scale);
  if (given(call.antiquant_offset)) each("antiquant_offset", call.antiquant_offset);
  int64_t length = -1;
  for (size_t i = 0; i < call.weight.size(); ++i) {
    const Matrix& w = call.weight[i];
    const at::Tensor& scale = call.antiquant_scale[i];
    require_same_dtype("antiquant_scale", call.antiquant_scale, i);
    const int64_t k = w.size(-2), n = w.size(-1), g = call.groups();
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
      require(length < 0 || length == k / parts, "antiquant_scale", show(scale),
              "parts of one length in all");
      length = k / parts;
      require(!on_a5() || length == 32 || length == 64 || length == 128 || length == 256,
              "antiquant_scale", show(scale), "parts of 32, 64, 128 or 256");
      require(!w.transposed || length % 2 == 0, "antiquant_scale", show(scale),
              "parts of an even length");
    }
    if (given(call.antiquant_offset)) {
      require_same_dtype("antiquant_offset", call.antiquant_offset, i);
      require(on_a5() || !parted, "antiquant_offset", show(call.antiquant_offset[i]),
              "nothing beside scales of groups");
      require_shape("antiquant_offset", call.antiquant_offset[i], {shape});
    }
  }
  if (dtype == kI4)
    require(call.weight[0].size(call.weight[0].transposed ? -2 : -1) % 2 == 0, "weight",
            show(call.weight[0]), "an even last dimension");
  if (dtype == kE4M3 || dtype == kE5M2)
    require(call.weight[0].transposed, "weight", "a tensor that is not transposed",
            "a transposed one");
}

void check_mixed(const Grouped& call, const Form& form) {
  const int64_t k = call.depth(), n = call.columns(), g = call.groups();
  if (form.kind == Kind::kMxW4) {
    require(call.weight[0].transposed, "weight", "a tensor that is not transposed",
            "a transposed one");
    require(k % 64 == 0 && n % 32 == 0, "weight", show(call.weight[0]),
            "K a multiple of 64, N of 32");
    // The document's shape is that of the memory; a view in the order of weight is accepted too
    // (our reading).
    check_each("antiquant_scale", call.antiquant_scale, call, {{n, k / 64, 2}, {k / 64, n, 2}});
    require_shape("per_token_scale", call.per_token[0], {{call.rows(), k / 64, 2}});
    return;
  }
  require(!call.weight[0].transposed, "weight", "a transposed tensor", "not transposed");
  const at::Tensor& scale = call.antiquant_scale[0];
  require(scale.dim() == 3 && scale.size(1) > 0, "antiquant_scale", show(scale),
          "[groups, K / group size, N]");
  const int64_t length = k / scale.size(1);
  require(length == 128 || length == 192 || length == 256 || length == 512, "antiquant_scale",
          show(scale), "groups of 128, 192, 256 or 512");
  require_shape("antiquant_scale", scale, {{g, k / length, n}});
  require_shape("scale", call.scale[0], {{g, n}});
  require_shape("per_token_scale", call.per_token[0], {{call.rows()}});
  require(k % 64 == 0 && n % 64 == 0, "weight", show(call.weight[0]), "K and N of whole 32 bytes");
}

}  // namespace

void check_grouped(const Grouped& call) {
  require(!call.x.empty() && call.x[0].defined(), "x", "nothing", "at least one tensor");
  require(!call.weight.empty() && call.weight[0].defined(), "weight", "nothing",
          "at least one tensor");
  require(!call.out.empty() && call.out[0], "out", "nothing", "at least one tensor");
  check_numbers(call);
  const Form& form = form_of(call);
  check_activation(call, form);
  check_lists(call, form);
  check_matrices(call, form);
  for (size_t i = 0; i < call.weight.size() && given(call.bias); ++i) {
    require(call.bias.size() == call.weight.size(), "bias",
            text(static_cast<int64_t>(call.bias.size())) + " tensors", "one for each weight");
    require_same_dtype("bias", call.bias, i);
    const int64_t n = call.weight[i].size(-1);
    require_shape("bias", call.bias[i],
                  call.weight[0].dim() == 3 ? Shapes{{call.groups(), n}} : Shapes{{n}});
  }
  if (form.kind == Kind::kScaled) check_scaled(call);
  if (form.kind == Kind::kMx) check_mx(call);
  if (form.kind == Kind::kMsd) check_msd(call);
  if (form.kind == Kind::kInt4) check_int4(call);
  if (form.kind == Kind::kAntiquant) check_antiquant(call);
  if (form.kind == Kind::kMxW4 || form.kind == Kind::kKcg) check_mixed(call, form);
}

}  // namespace softnpu::grouped
