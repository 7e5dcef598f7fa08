// vllm-project/vllm-ascend csrc/moe/moe_gating_top_k_hash: definition and tiling of the operator.
#include "softnpu/opapi/fused_moe_gating.h"

namespace softnpu {
namespace {

struct HashGating : Gating {
  void check_groups() const {
    require(group_count >= 1, "group_count", text(group_count), "at least 1");
    require(norm_type != 2 || group_count == 1, "group_count", text(group_count),
            "1 with norm_type 2 (square root of softplus)");
    require(x.size(1) % group_count == 0, "group_count", text(group_count),
            "a divisor of the experts");
    const int64_t group = x.size(1) / group_count;
    require(group > group_select_mode, "group_count", text(group_count),
            "groups of more than group_select_mode experts");
    require(k_group >= 1 && k_group <= group_count, "k_group", text(k_group), "1 to group_count");
    require(k >= 1 && k <= group * k_group, "k", text(k), "1 to the experts of the chosen groups");
    const bool grouped = group_count != 1 && group_count != x.size(1) && k_group != group_count;
    require(!grouped || (group + 31) / 32 * 32 * group_count <= 2048, "group_count",
            text(group_count), "groups padded to 32 experts that sum to at most 2048");
  }

  void check_modes() const {
    require(group_select_mode == 0 || group_select_mode == 1, "group_select_mode",
            text(group_select_mode), "0 or 1");
    require(renorm == 0, "renorm", text(renorm), "0");
    require(norm_type >= 0 && norm_type <= 2, "norm_type", text(norm_type),
            "0 (softmax), 1 (sigmoid) or 2 (square root of softplus)");
  }

  // That no row may be missing, nor a column of the table, is our reading: the tiling divides by
  // the rows, and the kernel reads k ids of a row.
  void check_shapes() const {
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(x.size(1) <= 2048, "x", show(x), "at most 2048 experts");
    require(!bias.defined() || bias.size(0) == x.size(1), "bias", show(bias),
            "one value for each expert");
    require(input_ids.defined() == tid2eid.defined(), input_ids.defined() ? "tid2eid" : "input_ids",
            "nothing", "both input_ids and tid2eid, or none");
    require(!input_ids.defined() || input_ids.numel() == x.size(0), "input_ids", show(input_ids),
            "a value for each row of x");
    require(!tid2eid.defined() || tid2eid.size(1) == k, "tid2eid", show(tid2eid),
            "k experts in each row");
    const std::vector<int64_t> chosen{x.size(0), k};
    require(y->sizes() == at::IntArrayRef(chosen), "y", show(*y), "k values for each row of x");
    require(expert_idx->sizes() == y->sizes(), "expert_idx", show(*expert_idx), "the shape of y");
    require(!out_flag || out->sizes() == x.sizes(), "out", show(*out), "the shape of x");
  }

  void check() const {
    const Types own = {x.defined() ? x.scalar_type() : kNone}, ints = {kI32, at::kLong};
    check_table({{"x", x, true, kFloats, 2, 2, kDocument},
                 {"bias", bias, false, own, 1, 1, kDocument},
                 {"input_ids", input_ids, false, ints, 1, 1, kReading},
                 {"tid2eid", tid2eid, false, ints, 2, 2, kReading},
                 {"y", *y, true, own, 2, 2, kDocument},
                 {"expert_idx", *expert_idx, true, {kI32}, 2, 2, kDocument},
                 {"out", *out, true, {kF32}, 2, 2, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [this] {
      check_modes();
      check_groups();
      check_shapes();
    });
  }
};

}  // namespace

NAMED(aclnnMoeGatingTopKHash, HashGating, v2, check, run)

}  // namespace softnpu
