#include <ATen/ops/empty.h>

#include "npu/embedding.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

struct Streams {
  static WhyNot why_not(const Context&, const at::Tensor& ids, const at::Tensor& weight, int64_t) {
    return first(not_of("weight", weight, kFloats), empty("input_ids", ids),
                 empty("weight", weight));
  }

  // Every id as often as there are streams: one launch instead of a lookup and its copies.
  static at::Tensor run(const at::Tensor& ids, const at::Tensor& weight, int64_t streams) {
    const at::Tensor repeated = ids.unsqueeze(-1).expand({-1, streams});
    at::Tensor out = at::empty({ids.size(0), streams, weight.size(1)}, weight.options());
    const NpuCall call("embed_streams", weight);
    call.launch(npu::Embedding{call.in(weight), call.in(repeated), call.out(out)});
    return out;
  }
};

const NpuRegistration<Streams, npu::Embedding> embed_streams("embed_streams");

}  // namespace
}  // namespace dsv4::bind
