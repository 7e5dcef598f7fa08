// Norms and rotations between the projections of attention and its caches.
#include <ATen/ops/empty.h>

#include "norm_npu.h"
#include "rotary_npu.h"
#include "step.h"

namespace dsv4::bind {
namespace {

// Rows of queries, of keys and of entries that close behind each other in one buffer [M, D]: what
// is done to all of them is done in one call.
struct JoinedRows {
  int64_t heads, tokens, entries;
  at::Tensor all;

  JoinedRows(const at::Tensor& q, const Optional& entries)
      : heads(q.size(1)),
        tokens(q.size(0)),
        entries(entries ? entries->size(0) : 0),
        all(at::empty({tokens * (heads + 1) + this->entries, q.size(2)}, q.options())) {}

  at::Tensor queries() const { return all.narrow(0, 0, tokens * heads).view({tokens, heads, -1}); }
  at::Tensor keys() const { return all.narrow(0, tokens * heads, tokens); }
  at::Tensor closed() const { return all.narrow(0, tokens * (heads + 1), entries); }
};

struct QkvNormRope {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& kv,
                        const Optional& entries, const at::Tensor& q_weight,
                        const at::Tensor& kv_weight, const Optional& entry_weight, double,
                        const at::Tensor&, const at::Tensor&, const Optional&, const Optional&) {
    return first(not_of("q", q, kFloats), not_of("kv", kv, {q.scalar_type()}), empty("q", q),
                 entries ? not_of("entries", *entries, {q.scalar_type()}) : WhyNot(),
                 not_of("q_weight", q_weight, kFloats), not_of("kv_weight", kv_weight, kFloats),
                 entry_weight ? not_of("entry_weight", *entry_weight, kFloats) : WhyNot(),
                 unless(q.size(-1) % 2 == 0 && q.size(-1) <= kWidestRotated,
                        "the chip takes an even number of channels, up to 1024"));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(
      const at::Tensor& q, const at::Tensor& kv, const Optional& entries,
      const at::Tensor& q_weight, const at::Tensor& kv_weight, const Optional& entry_weight,
      double eps, const at::Tensor& cos, const at::Tensor& sin, const Optional& entry_cos,
      const Optional& entry_sin) {
    const NpuCall call("qkv_norm_rope", q);
    const JoinedRows rows(q, entries);
    const at::Tensor queries = rows.queries(), keys = rows.keys(), closed = rows.closed();
    const bool some = rows.entries > 0;
    norm_into(call, q, q_weight, eps, queries);
    norm_into(call, kv, kv_weight, eps, keys);
    if (some) {
      norm_into(call, *entries, *entry_weight, eps, closed);
    }
    Derived joined{"joined rotation", {cos, sin}, {rows.heads}};
    if (some) {
      joined.of.insert(joined.of.end(), {*entry_cos, *entry_sin});
    }
    if (const Tensors* by = Step::find(joined)) {
      rotate(call, rows.all, Rotation(by->at(0), by->at(1)));
      return {queries, keys, closed};
    }
    const Rotation of_tokens(cos, sin);
    rotate(call, queries, of_tokens);
    rotate(call, keys, of_tokens);
    if (some) {
      rotate(call, closed, Rotation(*entry_cos, *entry_sin));
    }
    return {queries, keys, closed};
  }
};

const NpuRegistration<QkvNormRope, npu::RmsNorm, npu::InplacePartialRotaryMul> qkv_norm_rope(
    "qkv_norm_rope");

}  // namespace
}  // namespace dsv4::bind
