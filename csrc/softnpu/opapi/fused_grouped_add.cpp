// Products of the groups of K, added to what is there: the gradient of a grouped weight.
#include <ATen/ops/add.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>

#include "fused_family.h"

namespace softnpu {
namespace {

// hicann/ops-transformer gmm/grouped_matmul_add/docs/aclnnGroupedMatmulAddV2.md
struct GroupedAdd {
  at::Tensor x, weight, group_list;
  Out y;
  bool transpose_x, transpose_weight;
  int64_t group_type, group_list_type = 0;
  FIELDS(v1, x, weight, group_list, y, transpose_x, transpose_weight, group_type)
  FIELDS(list_type, group_list_type)
  auto v2() { return v1() + list_type(); }

  void check() const {
    check_table({{"x", x, true, kHalves, 2, 2, kDocument},
                 {"weight", weight, true, {x.defined() ? x.scalar_type() : kNone}, 2, 2, kDocument},
                 {"groupList", group_list, true, {at::kLong}, 1, 1, kDocument},
                 {"y", *y, true, {kF32}, 2, 3, kDocument}});
    require(transpose_x && !transpose_weight, "transposeX, transposeWeight",
            text(transpose_x) + ", " + text(transpose_weight), "true, false");
    require(group_type == 2, "groupType", text(group_type), "2 (groups of K)");
    require(group_list_type == 0 || group_list_type == 1, "groupListType", text(group_list_type),
            "0 (ends) or 1 (counts)");
    require(x.size(0) == weight.size(0), "weight", show(weight), "as many rows as x");
    const int64_t values = group_list.numel() * x.size(1) * weight.size(1);
    require(y->numel() == values && y->size(-1) == weight.size(1), "y", show(*y),
            "[groups x M, N] or [groups, M, N]");
  }

  void run() const {
    expect_values(group_list, 0, x.size(0) + 1, "groupList");
    const at::Tensor list = group_list.contiguous();
    std::vector<at::Tensor> products;
    int64_t begin = 0;
    for (int64_t i = 0; i < list.numel(); ++i) {
      const int64_t value = list.const_data_ptr<int64_t>()[i];
      const int64_t end = group_list_type ? begin + value : value;
      if (end < begin || end > x.size(0))
        throw Fault(kKernelFault, "groupList: group " + text(i) + " ends at row " + text(end) +
                                      ", expected " + text(begin) + " to " + text(x.size(0)));
      products.push_back(
          at::matmul(x.slice(0, begin, end).to(kF32).t(), weight.slice(0, begin, end).to(kF32)));
      begin = end;
    }
    y = at::add(*y, at::stack(products).reshape(y->sizes()));
  }
};

}  // namespace

NAMED(aclnnGroupedMatmulAdd, GroupedAdd, v1, check, run)
NAMED(aclnnGroupedMatmulAddV2, GroupedAdd, v2, check, run)

}  // namespace softnpu
