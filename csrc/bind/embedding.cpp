#include "cpu/embedding.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct EmbedStreamsKernel {
  static WhyNot why_not(const Context&, const at::Tensor&, const at::Tensor& weight, int64_t) {
    return not_adjacent_rows("weight", weight);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& input_ids, const at::Tensor& weight, int64_t hc_mult) {
    at::Tensor streams =
        new_tensor({input_ids.size(0), hc_mult, weight.size(1)}, weight.scalar_type());
    const auto item = static_cast<int64_t>(weight.element_size());
    cpu::embed_streams({indices_of(input_ids), input_ids.stride(0), input_ids.size(0),
                        static_cast<const char*>(weight.const_data_ptr()), weight.size(0),
                        weight.stride(0) * item, weight.size(1) * item, hc_mult,
                        static_cast<char*>(streams.mutable_data_ptr())});
    return streams;
  }
};

const IsaRegistration<EmbedStreamsKernel> embed_streams("embed_streams");

}  // namespace
}  // namespace dsv4::bind
