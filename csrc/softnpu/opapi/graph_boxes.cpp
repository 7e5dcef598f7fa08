// Overlaps of boxes and the anchors that answer for them. Documents: hicann/ops-cv objdetect/ciou,
// iou_v2, g_io_u_grad and anchor_response_flags. Boxes lie in columns [4, n], of Iou in rows [n,
// 4].
#include <ATen/ops/arange.h>
#include <ATen/ops/atan.h>
#include <ATen/ops/floor.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <numbers>

#include "check.h"
#include "graph.h"

namespace softnpu {
namespace {

constexpr double kTiny = 1e-16;  // keeps a quotient finite: our reading of "no division by zero"

struct Boxes {
  at::Tensor left, top, right, bottom;

  at::Tensor width() const { return right.sub(left); }
  at::Tensor height() const { return bottom.sub(top); }
  at::Tensor area() const { return width().mul(height()); }
};

// Corners, or with `centred` centre, width and height.
Boxes columns(In boxes, bool centred) {
  const at::Tensor x = wide(boxes);
  if (!centred) return {x[0], x[1], x[2], x[3]};
  const at::Tensor w = x[2].mul(0.5), h = x[3].mul(0.5);
  return {x[0].sub(w), x[1].sub(h), x[0].add(w), x[1].add(h)};
}

// Every box of b in a row against every one of a in a column: [boxes of b, boxes of a].
Boxes down(const Boxes& b) {
  return {b.left.unsqueeze(1), b.top.unsqueeze(1), b.right.unsqueeze(1), b.bottom.unsqueeze(1)};
}

at::Tensor intersection(const Boxes& a, const Boxes& b) {
  const at::Tensor w = at::minimum(a.right, b.right).sub(at::maximum(a.left, b.left));
  const at::Tensor h = at::minimum(a.bottom, b.bottom).sub(at::maximum(a.top, b.top));
  return w.clamp_min(0).mul(h.clamp_min(0));
}

Boxes hull(const Boxes& a, const Boxes& b) {
  return {at::minimum(a.left, b.left), at::minimum(a.top, b.top), at::maximum(a.right, b.right),
          at::maximum(a.bottom, b.bottom)};
}

// IoF divides by the foreground, the area of b.
at::Tensor overlap(const Boxes& a, const Boxes& b, const std::string& mode) {
  const at::Tensor shared = intersection(a, b);
  if (mode == "iof") return shared.div(b.area().add(kTiny));
  return shared.div(a.area().add(b.area()).sub(shared).add(kTiny));
}

at::Tensor giou(const Boxes& a, const Boxes& b, const std::string& mode) {
  const at::Tensor whole = hull(a, b).area().add(kTiny);
  const at::Tensor joined = a.area().add(b.area()).sub(intersection(a, b));
  return overlap(a, b, mode).sub(whole.sub(joined).div(whole));
}

// The overlap without the distance of the centres, over the diagonal of both boxes.
at::Tensor diou(const Boxes& a, const Boxes& b, const std::string& mode) {
  const Boxes whole = hull(a, b);
  const at::Tensor diagonal = whole.width().square().add(whole.height().square()).add(kTiny);
  const at::Tensor x = a.left.add(a.right).sub(b.left).sub(b.right),
                   y = a.top.add(a.bottom).sub(b.top).sub(b.bottom);
  return overlap(a, b, mode).sub(x.square().add(y.square()).mul(0.25).div(diagonal));
}

struct Ciou {
  at::Tensor overlap, atan_sub;
};

Ciou ciou(const Boxes& a, const Boxes& b, const std::string& mode) {
  const at::Tensor angle =
      at::atan(b.width().div(b.height())).sub(at::atan(a.width().div(a.height())));
  const at::Tensor v = angle.square().mul(4 / (std::numbers::pi * std::numbers::pi));
  const at::Tensor alpha = v.div(v.sub(overlap(a, b, mode)).add(1));
  return {diou(a, b, mode).sub(alpha.mul(v)), angle};
}

void require_boxes(In a, In b, bool cross) {
  require(a.dim() == 2 && a.size(0) == 4, "bBoxes", show(a), "[4, n]");
  require(b.dim() == 2 && b.size(0) == 4 && (cross || b.size(1) == a.size(1)), "gtBoxes", show(b),
          cross ? "[4, m]" : "the shape of bBoxes");
}

// hicann/ops-cv objdetect/ciou/docs/aclnnCIoU.md; its atanSubFlag is not among what torch_npu
// sends.
struct BoxCiou {
  at::Tensor boxes, truth;
  bool trans, is_cross;
  std::string mode;
  Out overlap, atan_sub;
  FIELDS(all, boxes, truth, trans, is_cross, mode, overlap, atan_sub)

  void check() const {
    require_generation(kOnA5);
    check_table({{"bBoxes", boxes, true, kFloats, 2, 2, kDocument},
                 {"gtBoxes", truth, true, kFloats, 2, 2, kDocument},
                 {"overlap", *overlap, true, kFloats, 2, 2, kDocument},
                 {"atanSub", *atan_sub, true, kFloats, 2, 2, kDocument}});
    require_boxes(boxes, truth, is_cross);
    require(mode == "iou" || mode == "iof", "mode", mode, "iou or iof");
  }

  void run() const { store(boxes, truth, trans, is_cross, mode, overlap, atan_sub); }

  static void store(In boxes, In truth, bool trans, bool cross, const std::string& mode,
                    const Out& overlap, const Out& atan_sub) {
    const Boxes a = columns(boxes, trans), b = columns(truth, trans);
    const Ciou result = ciou(a, cross ? down(b) : b, mode);
    overlap = result.overlap.reshape(overlap->sizes());
    atan_sub = result.atan_sub.reshape(atan_sub->sizes());
  }
};

void store_overlap(const GraphArguments& a,
                   at::Tensor (*of)(const Boxes&, const Boxes&, const std::string&)) {
  const bool trans = a.flag("trans"), cross = a.flag("is_cross");
  require_boxes(a.in(0), a.in(1), cross);
  const Boxes boxes = columns(a.in(0), trans), truth = columns(a.in(1), trans);
  a.out(0) = of(boxes, cross ? down(truth) : truth, a.attribute<std::string>("mode"))
                 .reshape(a.out(0)->sizes());
}

}  // namespace

NAMED(aclnnCIoU, BoxCiou, all, check, run)

GRAPH_OP(CIoU, [](const GraphArguments& a) {
  const bool cross = a.flag("is_cross");
  require_boxes(a.in(0), a.in(1), cross);
  BoxCiou::store(a.in(0), a.in(1), a.flag("trans"), cross, a.attribute<std::string>("mode"),
                 a.out(0), a.out(1));
})
GRAPH_OP(DIoU, [](const GraphArguments& a) { store_overlap(a, diou); })
GRAPH_OP(GIoU, [](const GraphArguments& a) { store_overlap(a, giou); })
// Widths and heights that an area is made of grow by eps.
GRAPH_OP(Iou, [](const GraphArguments& a) {
  Boxes boxes = columns(a.in(0).t(), false), truth = down(columns(a.in(1).t(), false));
  const at::Tensor shared = intersection(boxes, truth);
  const double eps = a.attribute<double>("eps");
  for (Boxes* of : {&boxes, &truth})
    of->right = of->right.add(eps), of->bottom = of->bottom.add(eps);
  a.out(0) = a.attribute<std::string>("mode") == "iof"
                 ? shared.div(truth.area())
                 : shared.div(boxes.area().add(truth.area()).sub(shared));
})
// Centres outside of the map count for its nearest place.
GRAPH_OP(AnchorResponseFlags, [](const GraphArguments& a) {
  const auto& size = a.attribute<std::vector<int64_t>>("featmap_size");
  const auto& strides = a.attribute<std::vector<int64_t>>("strides");
  const Boxes boxes = columns(a.in(0).t(), false);
  const auto place = [](In low, In high, int64_t stride) {
    return at::floor(low.add(high).mul(0.5).div(stride)).to(at::kLong);
  };
  const at::Tensor index = place(boxes.top, boxes.bottom, strides.at(1))
                               .mul(size.at(1))
                               .add(place(boxes.left, boxes.right, strides.at(0)))
                               .clamp(0, size[0] * size[1] - 1);
  a.out(0) = at::zeros({size[0] * size[1]}, at::kByte)
                 .index_fill(0, index, 1)
                 .repeat_interleave(a.attribute<int64_t>("num_base_anchors"));
})

// Anchors that answer for a box (flags) take it where they overlap enough; then each box takes the
// anchors, or the first anchor, of its own largest overlap. Our reading, after the assigner of
// MMDetection that the operator is made for.
GRAPH_OP(GridAssignPositive, [](const GraphArguments& a) {
  const at::Tensor overlaps = wide(a.in(1)), best = wide(a.in(5));
  const at::Tensor flags = a.in(2).ne(0), first = a.in(6).to(at::kLong);
  at::Tensor assigned = wide(a.in(0)).clone();
  const at::Tensor enough = wide(a.in(3)).gt(a.attribute<double>("pos_iou_thr"));
  assigned = at::where(enough.logical_and(flags), wide(a.in(4).add(1)), assigned);
  const int64_t boxes =
      std::min(overlaps.size(0), static_cast<int64_t>(a.in(7).reshape({-1})[0].item<double>()));
  for (int64_t box = 0; box < boxes; ++box) {
    if (!(best[box].item<double>() > a.attribute<double>("min_pos_iou"))) continue;
    const at::Tensor mine =
        a.flag("gt_max_assign_all")
            ? overlaps[box].eq(best[box])
            : at::arange(overlaps.size(1), at::kLong).eq(first[box].item<int64_t>());
    assigned.masked_fill_(mine.logical_and(flags), static_cast<double>(box + 1));
  }
  a.out(0) = assigned;
})

// hicann/ops-cv objdetect/roi_align: each place of a region is the mean of samples between four
// values. Nothing lies more than one value outside of the map; a region is at least 1 wide.
GRAPH_OP(ROIAlign, [](const GraphArguments& a) {
  const at::Tensor map = wide(a.in(0)), regions = wide(a.in(1)).contiguous();
  const int64_t height = a.attribute<int64_t>("pooled_height"),
                width = a.attribute<int64_t>("pooled_width"),
                samples = a.attribute<int64_t>("sample_num"),
                end_mode = a.attribute<int64_t>("roi_end_mode");
  if (samples < 1 || end_mode < 0 || end_mode > 1)
    throw Fault(kKernelFault, "sample_num below 1 and roi_end_mode above 1 are not emulated");
  const double scale = a.attribute<double>("spatial_scale");
  std::vector<at::Tensor> pooled;
  for (int64_t i = 0; i < regions.size(0); ++i) {
    const float* const region = regions[i].const_data_ptr<float>();
    // Positions of the samples along an axis, [places * samples], and their two weights.
    const auto along = [&](double first, double last, int64_t places, int64_t size) {
      const double length = std::max((last + static_cast<double>(end_mode) - first) * scale, 1.0);
      const double step = length / static_cast<double>(places * samples);
      const at::Tensor position =
          at::arange(places * samples, kF32).add(0.5).mul(step).add(first * scale);
      const at::Tensor inside = position.ge(-1).logical_and(position.le(size)).to(kF32);
      const at::Tensor place = position.clamp(0, size - 1);
      const at::Tensor columns = at::arange(size, kF32).unsqueeze(0);
      const at::Tensor near = place.unsqueeze(1).sub(columns).abs().neg().add(1).clamp_min(0);
      return near.mul(inside.unsqueeze(1)).view({places, samples, size}).mean(1);
    };
    const at::Tensor rows = along(region[2], region[4], height, map.size(2)),
                     columns = along(region[1], region[3], width, map.size(3));
    pooled.push_back(
        at::matmul(at::matmul(rows, map[static_cast<int64_t>(region[0])]), columns.t()));
  }
  a.out(0) = at::stack(pooled);
})

}  // namespace softnpu
