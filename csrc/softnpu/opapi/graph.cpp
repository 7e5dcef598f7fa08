#include "graph.h"

#include <ATen/ops/_cdist_backward.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include "matrix.h"
#include "recurrent.h"

namespace softnpu {
namespace {

aclTensor contiguous(const GraphTensor& tensor) {
  const Description& d = *tensor.description;
  std::vector<int64_t> strides(d.dims.size(), 1);
  for (size_t i = strides.size(); i-- > 1;) strides[i - 1] = strides[i] * d.dims[i];
  return {d.dims, strides, d.dims, 0, d.dtype, d.format, tensor.buffer->data};
}

// Sizes and storage of a tensor in the NZ format.
aclTensor tiles(const GraphTensor& tensor) {
  aclTensor raw = contiguous(tensor);
  raw.sizes = tensor.description->origin;
  raw.strides.assign(raw.sizes.size(), 1);
  for (size_t i = raw.sizes.size(); i-- > 1;) raw.strides[i - 1] = raw.strides[i] * raw.sizes[i];
  return raw;
}

// A result that the kernel makes in rows and columns and the device keeps in the NZ format.
struct TiledResult {
  Tiles tiles;
  char* data = nullptr;  // nullptr: an ordinary result
  std::vector<int64_t> sizes;
  at::ScalarType type;
};

TiledResult tiled_result(Builder& builder, const GraphTensor& tensor) {
  const aclTensor raw = tiles(tensor);
  const size_t rank = raw.sizes.size();
  if (rank < 2) throw Fault(kNnParameter, "a vector in the NZ format is not emulated");
  TiledResult result{{1, raw.sizes[rank - 2], raw.sizes[rank - 1], tile_width(raw),
                      c10::elementSize(scalar_type(raw.dtype))},
                     nullptr,
                     raw.sizes,
                     scalar_type(raw.dtype)};
  for (size_t i = 0; i + 2 < rank; ++i) result.tiles.batch *= raw.sizes[i];
  result.data = static_cast<char*>(builder.alias(raw.data, result.tiles.bytes(true)));
  builder.has_output = true;
  return result;
}

// Read at launch: the caller's memory may be gone when the kernel runs.
at::Tensor host_values(const GraphTensor& tensor) {
  const Description& d = *tensor.description;
  const auto type = scalar_type(d.dtype);
  const auto wanted = static_cast<size_t>(c10::multiply_integers(d.dims)) * c10::elementSize(type);
  if (!tensor.buffer->data || wanted > tensor.buffer->size)
    throw Fault(kNnParameter, "a host input of " + std::to_string(tensor.buffer->size) +
                                  " bytes, expected " + std::to_string(wanted));
  return at::from_blob(tensor.buffer->data, d.dims, type).clone();
}

}  // namespace

int launch_graph_operator(const GraphCall& call, void (*kernel)(const GraphArguments&)) try {
  Builder builder(call.type.c_str(), true);
  GraphArguments arguments{{}, {}, call.attributes};
  std::vector<std::pair<size_t, Matrix>> tiled;  // inputs that the kernel reads as rows and columns
  for (const GraphTensor& input : call.inputs) {
    if (input.description->on_host) {
      arguments.inputs.push_back(host_values(input));
      continue;
    }
    const aclTensor raw = contiguous(input);
    if (raw.data && tile_width(raw)) {
      const aclTensor matrix = tiles(input);
      tiled.emplace_back(arguments.inputs.size(), take_matrix(builder, &matrix));
      arguments.inputs.emplace_back();
      continue;
    }
    const bool empty = !raw.data && !raw.sizes.empty() && c10::multiply_integers(raw.sizes) == 0;
    arguments.inputs.push_back(empty ? at::empty(raw.sizes, scalar_type(raw.dtype))
                                     : builder.tensor(raw.data ? &raw : nullptr));
  }
  std::vector<TiledResult> results;
  for (const GraphTensor& output : call.outputs) {
    const aclTensor raw = contiguous(output);
    const bool nz = raw.data && tile_width(raw);
    results.push_back(nz ? tiled_result(builder, output) : TiledResult{});
    arguments.outputs.push_back(nz ? Out() : builder.out(&raw));
  }
  set_kernel(builder, [kernel, arguments = std::move(arguments), tiled = std::move(tiled),
                       results = std::move(results)] {
    GraphArguments plain{arguments.inputs, {}, arguments.attributes};
    for (const auto& [place, matrix] : tiled) plain.inputs[place] = matrix.read();
    for (size_t i = 0; i < results.size(); ++i)
      plain.outputs.push_back(results[i].data ? Out(at::empty(results[i].sizes, results[i].type))
                                              : arguments.outputs[i]);
    kernel(plain);
    for (size_t i = 0; i < results.size(); ++i)
      if (results[i].data)
        retile(results[i].tiles, results[i].data, static_cast<char*>(plain.outputs[i]->data_ptr()),
               true);
  });
  return enqueue(builder.launch, call.stream);
} catch (const c10::Error& error) {
  return fail(kNnParameter, "softnpu: %s: %s", call.type.c_str(), error.what_without_backtrace());
}

std::vector<int64_t> integers(In values) {
  const at::Tensor wide = values.to(at::kLong).reshape({-1}).contiguous();
  return {wide.data_ptr<int64_t>(), wide.data_ptr<int64_t>() + wide.numel()};
}

// A norm in two steps: sum of |x|^p, then the root.
GRAPH_OP(LpNormReduceV2, [](const GraphArguments& a) {
  const at::Tensor powers = at::pow(at::abs(a.in(0)), a.attribute<double>("p"));
  a.out(0) = at::sum(powers, a.attribute<std::vector<int64_t>>("axes"),
                     a.attribute<int64_t>("keepdim") != 0);
})
GRAPH_OP(LpNormUpdateV2,
         [](const GraphArguments& a) { a.out(0) = at::pow(a.in(0), 1 / a.attribute<double>("p")); })

// Overflow leaves infinities in the values, as A2 and later compute by default: the register that
// would hold it stays 0.
GRAPH_OP(NPUClearFloatStatusV2, [](const GraphArguments&) {})
GRAPH_OP(NPUGetFloatStatusV2, [](const GraphArguments& a) { a.out(0).touch(), a.out(0)->zero_(); })

GRAPH_OP(Cast, [](const GraphArguments& a) { a.out(0) = a.in(0); })
// Everything comes broadcast to [..., rows of a, rows of b, features]; p = -1 stands for infinity.
GRAPH_OP(CdistGrad, [](const GraphArguments& a) {
  if (a.in(0).numel() == 0) return void(a.out(0) = at::zeros_like(*a.out(0)));
  const double p = a.attribute<double>("p");
  const at::Tensor gradient = a.in(0).select(-1, 0).contiguous(),
                   distance = a.in(3).select(-1, 0).contiguous();
  const at::Tensor rows = a.in(1).select(-2, 0).contiguous(),
                   others = a.in(2).select(-3, 0).contiguous();
  a.out(0) = at::_cdist_backward(gradient, rows, others,
                                 p == -1 ? std::numeric_limits<double>::infinity() : p, distance);
})

namespace {

// A mask [time, batch, hidden] of the steps that are not padding; a scalar stands for none.
at::Tensor active(In mask) {
  if (!mask.defined() || mask.dim() < 3) return {};
  return mask.slice(2, 0, 1).ne(0);
}

Sequence sequence(const GraphArguments& a, In mask) {
  return {a.in(0), active(mask), a.attribute<std::string>("direction") == "REDIRECTIONAL"};
}

// Both weights lie in one matrix [inputs + hidden, 4 * hidden].
Weights split(In joined, In bias, int64_t inputs) {
  const at::Tensor w = joined.t();
  return {w.slice(1, 0, inputs), w.slice(1, inputs), bias, {}};
}

at::Tensor batch_of(In state) { return state.reshape({-1, state.size(-1)}); }

void store(const GraphArguments& a, const Sequence& s, const LstmSteps& k) {
  a.out(0) = outputs(s, k.h), a.out(1) = k.h, a.out(2) = k.c;
  const at::Tensor* const gates[] = {&k.gates.i, &k.gates.j, &k.gates.f, &k.gates.o,
                                     &k.gates.tanhc};
  for (size_t i = 0; i < 5; ++i) a.out(3 + i) = *gates[i];
}

LstmSteps steps(const GraphArguments& a) {
  const at::IntArrayRef all =
      a.in(11).sizes();  // an LSTM cell's states come without the axis of time
  return {{a.in(11), a.in(12), a.in(13), a.in(14), a.in(15)},
          a.in(6).reshape(all),
          a.in(7).reshape(all)};
}

void store_as(const Out& out, In value) { out = value.reshape(out->sizes()); }

}  // namespace

GRAPH_OP(DynamicRNN, [](const GraphArguments& a) {
  const Sequence s = sequence(a, a.in(3));
  store(
      a, s,
      lstm_forward(s, split(a.in(1), a.in(2), s.x.size(2)), batch_of(a.in(4)), batch_of(a.in(5))));
})
GRAPH_OP(DynamicRNNGrad, [](const GraphArguments& a) {
  const Sequence s = sequence(a, a.in(16));
  const auto g =
      lstm_backward(s, split(a.in(1), a.in(2), s.x.size(2)), batch_of(a.in(4)), batch_of(a.in(5)),
                    steps(a), a.in(8), batch_of(a.in(9)), batch_of(a.in(10)));
  a.out(0) = at::cat({g.weights.input, g.weights.hidden}, 1).t();
  a.out(1) = g.weights.input_bias, a.out(2) = g.x;
  store_as(a.out(3), g.h), store_as(a.out(4), g.c);
})
// One step of an LSTM cell, with a matrix for each weight.
GRAPH_OP(DynamicRNNV2, [](const GraphArguments& a) {
  const Sequence s = sequence(a, a.in(4));
  store(a, s,
        lstm_forward(s, {a.in(1).t(), a.in(2).t(), a.in(3), {}}, batch_of(a.in(5)),
                     batch_of(a.in(6))));
})
GRAPH_OP(DynamicRNNV2Grad, [](const GraphArguments& a) {
  const at::Tensor x = a.in(0).reshape({1, -1, a.in(0).size(-1)});
  const auto g =
      lstm_backward({x, {}, false}, {a.in(1).t(), a.in(2).t(), {}, {}}, batch_of(a.in(4)),
                    batch_of(a.in(5)), steps(a), a.in(8), batch_of(a.in(9)), batch_of(a.in(10)));
  a.out(0) = g.weights.input.t(), a.out(1) = g.weights.hidden.t(), a.out(2) = g.weights.input_bias;
  store_as(a.out(3), g.x), store_as(a.out(4), g.h), store_as(a.out(5), g.c);
})
GRAPH_OP(DynamicGRUV2, [](const GraphArguments& a) {
  const Sequence s{a.in(0), {}, false};
  const GruSteps k =
      gru_forward(s, {a.in(1).t(), a.in(2).t(), a.in(3), a.in(4)}, batch_of(a.in(6)));
  a.out(0) = k.h, a.out(1) = k.h, a.out(2) = k.z, a.out(3) = k.r, a.out(4) = k.n,
  a.out(5) = k.hidden_n;
})
GRAPH_OP(DynamicGRUV2Grad, [](const GraphArguments& a) {
  const GruSteps k{a.in(9), a.in(8), a.in(10), a.in(11), a.in(5)};
  const auto g = gru_backward({a.in(0), {}, false}, {a.in(1).t(), a.in(2).t(), {}, {}},
                              batch_of(a.in(4)), k, a.in(6), batch_of(a.in(7)));
  a.out(0) = g.weights.input.t(), a.out(1) = g.weights.hidden.t();
  a.out(2) = g.weights.input_bias, a.out(3) = g.weights.hidden_bias, a.out(4) = g.x;
  store_as(a.out(5), g.h);
})

}  // namespace softnpu
