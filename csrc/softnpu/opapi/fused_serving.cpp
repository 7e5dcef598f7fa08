// Grouped products and paged caches. Tables: argument, required, dtypes, ranks, source.
#include <ATen/ops/matmul.h>

#include "check.h"

namespace softnpu {
namespace {

constexpr Source kDocument = Source::kDocument;

// Rows of each group: group_list_type 0 gives ends, 1 gives counts.
std::vector<int64_t> group_ends(In list, int64_t type, int64_t groups, int64_t rows) {
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t value = list[i].item<int64_t>();
    end = type == 0 ? value : end + value;
    ends.push_back(end);
    if (end > rows || (i && end < ends[static_cast<size_t>(i) - 1]))
      throw Fault(kKernelFault, "group_list goes beyond the rows of x or falls");
  }
  return ends;
}

// npu_grouped_matmul, the unquantised forms with one x, one weight [E, K, N] (or one for each group) and one result,
// grouped along the rows.
void check_grouped(Ins x, Ins weight, Ins bias, Ins scale, Ins antiquant, In list, int64_t split, int64_t type,
                   int64_t list_type, int64_t act) {
  require(x.size() == 1, "x", std::to_string(x.size()) + " tensors", "one tensor (several are not emulated)");
  require(!weight.empty(), "weight", "nothing", "at least one tensor");
  require(scale.empty() && antiquant.empty(), "scale", "a quantised form", "no scales (not emulated)");
  require(split == 2 || split == 3, "split_item", std::to_string(split), "2 or 3: one result");
  require(type == 0, "group_type", std::to_string(type), "0: groups along the rows of x");
  require(list_type == 0 || list_type == 1, "group_list_type", std::to_string(list_type), "0 or 1");
  require(act == 0, "act_type", std::to_string(act), "0 (activations are not emulated)");
  check_table({{"x", true, {kF16, kBF16, kF32}, 2, 6, kDocument}, {"group_list", true, {at::kLong}, 1, 1, kDocument}},
              {x[0], list});
  const auto groups = static_cast<size_t>(list.numel());
  for (const at::Tensor& w : weight) {
    require(w.scalar_type() == x[0].scalar_type(), "weight", show(w), "the dtype of x");
    require(weight.size() == 1 ? w.dim() == 3 && static_cast<size_t>(w.size(0)) == groups : w.dim() == 2, "weight",
            show(w), "[groups, K, N], or [K, N] for each group");
    require(w.size(-2) == x[0].size(-1), "weight", show(w), "the last dimension of x as K");
  }
  require(weight.size() == 1 || weight.size() == groups, "weight", std::to_string(weight.size()) + " tensors",
          "one for each group");
  for (const at::Tensor& b : bias)
    require(b.scalar_type() == kF32 || b.scalar_type() == x[0].scalar_type(), "bias", show(b),
            "fp32 or the dtype of x");
}

void grouped(Ins x, Ins weight, Ins bias, In list, int64_t list_type, Outs o) {
  const auto ends = group_ends(list, list_type, list.numel(), x[0].size(0));
  int64_t start = 0;
  o[0].touch();
  for (size_t i = 0; i < ends.size(); ++i) {
    const auto at_group = static_cast<int64_t>(i);
    const at::Tensor w = weight.size() == 1 ? weight[0][at_group] : weight[i];
    at::Tensor y = at::matmul(x[0].slice(0, start, ends[i]).to(kF32), w.to(kF32));
    if (!bias.empty()) y = y.add((bias.size() == 1 && bias[0].dim() == 2 ? bias[0][at_group] : bias[i]).to(kF32));
    o[0]->slice(0, start, ends[i]).copy_(y);  // the rows behind the last group are not written
    start = ends[i];
  }
}

constexpr auto check_v4 = [](Ins x, Ins w, Ins bias, Ins scale, Ins, Ins antiquant, Ins, Ins, In list, Ins, Ins, Ins,
                             int64_t split, int64_t type, int64_t list_type, int64_t act, Outs, Outs,
                             Outs) { check_grouped(x, w, bias, scale, antiquant, list, split, type, list_type, act); };
constexpr auto check_v5 = [](Ins x, Ins w, Ins bias, Ins scale, Ins, Ins antiquant, Ins, Ins, In list, Ins, Ins, Ins,
                             int64_t split, int64_t type, int64_t list_type, int64_t act, Ints, Outs, Outs,
                             Outs) { check_grouped(x, w, bias, scale, antiquant, list, split, type, list_type, act); };

}  // namespace

CHECKED(aclnnGroupedMatmulV4, check_v4,
        [](Ins x, Ins w, Ins bias, Ins, Ins, Ins, Ins, Ins, In list, Ins, Ins, Ins, int64_t, int64_t, int64_t list_type,
           int64_t, Outs o, Outs, Outs) { grouped(x, w, bias, list, list_type, o); })
CHECKED(aclnnGroupedMatmulV5, check_v5,
        [](Ins x, Ins w, Ins bias, Ins, Ins, Ins, Ins, Ins, In list, Ins, Ins, Ins, int64_t, int64_t, int64_t list_type,
           int64_t, Ints, Outs o, Outs, Outs) { grouped(x, w, bias, list, list_type, o); })

}  // namespace softnpu
