// Rotary position embeddings. Tables: argument, its tensor, required, dtypes, smallest and largest
// rank, source.
#include "check.h"
#include "rotary.h"

namespace softnpu {
namespace {

// The page's coreNum, taken as vector cores: two for each of 24 cores, of 20 on the smaller 910B.
int64_t vector_cores() {
  const std::string& soc = config().soc;
  return soc.rfind("Ascend910B3", 0) == 0 || soc.rfind("Ascend910B4", 0) == 0 ? 40 : 48;
}

// Which axis of x is which.
struct Axes {
  int64_t batch, head, position;
};
constexpr Axes kBnsd = {0, 1, 2}, kBsnd = {0, 2, 1}, kSbnd = {1, 2, 0};

bool bnsd_fits(In x, int64_t rows) {  // rows: batch * heads
  const int64_t width = x.size(3), positions = x.size(2), block = 32 / x.element_size();
  if (width / 2 % block == 0) return rows <= positions * 8;
  return rows * 2 <= (positions + vector_cores() - 1) / vector_cores() || width >= 80;
}

bool layout_fits(In x, In cos, int64_t mode, const Axes& axes) {
  const int64_t batch = x.size(axes.batch), heads = x.size(axes.head);
  const bool one_batch = cos.size(axes.batch) == 1, one_head = cos.size(axes.head) == 1;
  if (cos.size(axes.position) != x.size(axes.position)) return false;
  if (mode == rotary::kInterleave) return one_batch && one_head && batch * heads < 1000;
  const bool every_batch = cos.size(axes.batch) == batch, every_head = cos.size(axes.head) == heads;
  if (!(one_head ? one_batch || every_batch : every_head && every_batch)) return false;
  return batch < 1000 && heads < 1000 && (axes.position != 2 || bnsd_fits(x, batch * heads));
}

// On A2 and A3 the page lists shapes of cos for each layout of x. Nothing says which layout it is:
// one that fits is enough.
bool some_layout_fits(In x, In cos, int64_t mode) {
  if (x.dim() == 3) {  // TND
    const bool heads = cos.size(1) == 1 || (mode == rotary::kHalf && cos.size(1) == x.size(1));
    return cos.size(0) == x.size(0) && heads && x.size(1) < 1000;
  }
  return layout_fits(x, cos, mode, kBnsd) || layout_fits(x, cos, mode, kBsnd) ||
         layout_fits(x, cos, mode, kSbnd);
}

void check_widths(In x, int64_t mode) {
  const int64_t width = x.size(-1);
  if (on_a5())
    require(width <= 1024 && width % (mode == rotary::kQuarter ? 4 : 2) == 0, "x", show(x),
            "a last dimension of at most 1024, a multiple of 2 (of 4 in mode 2)");
  else
    require(width < 896 && width % 2 == 0, "x", show(x), "an even last dimension below 896");
}

void check_broadcast(In x, In cos) {
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) {
    const bool every = cos.size(axis) == x.size(axis), tokens = x.dim() == 3 && axis == 0;
    require(every || (cos.size(axis) == 1 && !tokens), "cos", show(cos),
            "sizes of x, or 1 (not for the tokens of TND)");
  }
}

void check_rotary_shapes(In x, In cos, In sin, int64_t mode, In rotate) {
  require(
      mode >= rotary::kHalf && mode <= (on_a5() ? rotary::kInterleaveHalf : rotary::kInterleave),
      "mode", text(mode),
      "0 (half) or 1 (interleave); on Ascend 950 also 2 (quarter) or 3 (interleave-half)");
  check_widths(x, mode);
  require(cos.sizes() == sin.sizes(), "sin", show(sin), "the shape of cos");
  require(cos.dim() == x.dim() && cos.size(-1) == x.size(-1), "cos", show(cos),
          "rank and last dimension of x");
  if (on_a5()) {
    check_broadcast(x, cos);
    return;
  }
  require(some_layout_fits(x, cos, mode), "cos", show(cos) + " for x " + show(x),
          "half: 11SD, B1SD, BNSD, 1S1D, BS1D, BSND, S11D, SB1D, SBND, T1D or TND; interleave: "
          "11SD, 1S1D, S11D or T1D; "
          "with the document's limits of B and N");
  if (!rotate.defined()) return;
  require(rotate.size(0) == x.size(-1) && rotate.size(1) == x.size(-1), "rotate", show(rotate),
          "[D, D]");
}

// mirror-cann/ops-transformer
// posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md and
// aclnnRotaryPositionEmbeddingV2.md
struct Rotary {
  at::Tensor x, cos, sin;
  int64_t mode;
  at::Tensor rotate;
  Out out;
  FIELDS(v1, x, cos, sin, mode, out)
  FIELDS(v2, x, cos, sin, mode, rotate, out)

  void check() const {
    check_table({{"x", x, true, kFloats, 3, 4, kDocument},
                 {"cos", cos, true, kFloats, 3, 4, kDocument},
                 {"sin", sin, true, kFloats, 3, 4, kDocument},
                 {"rotate", rotate, false, kFloats, 2, 2, kDocument}},
                kTilingRefuses);
    require(cos.scalar_type() == x.scalar_type(), "cos", show(cos), "the dtype of x");
    require(sin.scalar_type() == x.scalar_type(), "sin", show(sin), "the dtype of x");
    if (rotate.defined()) {
      require(!on_a5(), "rotate", show(rotate), "nothing on this chip");
      require(rotate.scalar_type() == x.scalar_type(), "rotate", show(rotate), "the dtype of x");
    }
    refusing_with(kTilingRefuses, [&] { check_rotary_shapes(x, cos, sin, mode, rotate); });
  }

  void run() const { out = rotated(x, cos, sin, mode, rotate); }
};

void check_interleaved_shapes(In x, In cos, In sin) {
  require(x.size(3) == 64, "x", show(x), "a last dimension of 64");
  require(cos.sizes() == sin.sizes(), "sin", show(sin), "the shape of cos");
  const bool batch =
      cos.size(0) == x.size(0) || (on_a5() && cos.size(0) == 1);  // A2 and A3: our reading
  require(batch && cos.size(1) == 1 && (cos.size(2) == 1 || cos.size(2) == x.size(2)) &&
              cos.size(3) == 64,
          "cos", show(cos), "[B, 1, S or 1, 64]");
}

// mirror-cann/ops-transformer posembedding/interleave_rope/docs/aclnnInterleaveRope.md (it lists
// Ascend 950 only) and README.md (it lists A2 and A3 only): both taken, our reading.
struct Interleaved {
  at::Tensor x, cos, sin;
  Out out;
  FIELDS(all, x, cos, sin, out)

  void check() const {
    const Types& types = on_a5() ? kFloats : kHalves;
    check_table({{"x", x, true, types, 4, 4, kReading},
                 {"cos", cos, true, types, 4, 4, kReading},
                 {"sin", sin, true, types, 4, 4, kReading}},
                kTilingRefuses);
    require(cos.scalar_type() == x.scalar_type(), "cos", show(cos), "the dtype of x");
    require(sin.scalar_type() == x.scalar_type(), "sin", show(sin), "the dtype of x");
    refusing_with(kTilingRefuses, [&] { check_interleaved_shapes(x, cos, sin); });
  }

  void run() const { out = rotated(x, cos, sin, rotary::kInterleaveHalf, at::Tensor()); }
};

}  // namespace

NAMED(aclnnRotaryPositionEmbedding, Rotary, v1, check, run)
NAMED(aclnnRotaryPositionEmbeddingV2, Rotary, v2, check, run)
NAMED(aclnnInterleaveRope, Interleaved, all, check, run)

}  // namespace softnpu
