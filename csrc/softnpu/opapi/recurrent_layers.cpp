// nn.LSTM and nn.GRU: layers in both directions, padded sequences (torch_npu keeps the padding of
// packed ones), and the fused LSTM cell.
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>

#include "recurrent.h"

namespace softnpu {
namespace {

struct Form {
  bool biases;
  int64_t layers;
  bool bidirectional, batch_first;
  int64_t directions() const { return bidirectional ? 2 : 1; }
  Weights weights(Ins parameters, int64_t place) const {
    const auto at = static_cast<size_t>(place) * (biases ? 4 : 2);
    return {parameters[at], parameters[at + 1], biases ? parameters[at + 2] : at::Tensor(),
            biases ? parameters[at + 3] : at::Tensor()};
  }
};

Form form_of(bool biases, int64_t layers, bool bidirectional, bool batch_first, Ins parameters) {
  const Form form{biases, layers, bidirectional, batch_first};
  const size_t expected = static_cast<size_t>(layers * form.directions()) * (biases ? 4 : 2);
  if (parameters.size() != expected)
    throw Fault(kNnParameter, "argument 'params': found " + std::to_string(parameters.size()) +
                                  " tensors, expected " + std::to_string(expected));
  return form;
}

void refuse_dropout(double dropout, bool train, const Form& form) {
  if (dropout > 0 && train && form.layers > 1)
    throw Fault(kKernelFault, "dropout between recurrent layers is not emulated");
}

bool packed(OptionalIn batch_sizes) { return batch_sizes && batch_sizes->numel(); }

at::Tensor time_first(In x, const Form& form, OptionalIn batch_sizes) {
  if (packed(batch_sizes)) return x.reshape({batch_sizes->numel(), -1, x.size(-1)});
  return form.batch_first ? x.transpose(0, 1) : x;
}

// Of packed data torch_npu wants some results with time and batch in one axis, some not.
at::Tensor as_given(In x, const Form& form, OptionalIn batch_sizes, const Out& like) {
  if (packed(batch_sizes)) return x.reshape(like->sizes());
  return form.batch_first ? x.transpose(0, 1) : x;
}

at::Tensor active_steps(In x, OptionalIn batch_sizes) {
  if (!packed(batch_sizes)) return {};
  return at::lt(at::arange(x.size(1)).unsqueeze(0), batch_sizes->unsqueeze(1)).unsqueeze(-1);
}

// run(sequence, weights, place) gives the states h of one direction of one layer; the result is the
// last layer's.
template <class Run>
at::Tensor forward_layers(In x, In active, const Form& form, Ins parameters, Run run) {
  at::Tensor y = x;
  for (int64_t layer = 0; layer < form.layers; ++layer) {
    std::vector<at::Tensor> directions;
    for (int64_t d = 0; d < form.directions(); ++d) {
      const Sequence sequence{y, active, d == 1};
      const int64_t place = layer * form.directions() + d;
      directions.push_back(
          outputs(sequence, run(sequence, form.weights(parameters, place), place)));
    }
    y = at::cat(directions, -1);
  }
  return y;
}

// run(sequence, weights, place, dy) gives the gradients of one direction; the result is that of x.
template <class Run>
at::Tensor backward_layers(In x, In active, const Form& form, Ins parameters, Ins states, In dy,
                           Outs dparameters, Run run) {
  at::Tensor gradient = dy;
  for (int64_t layer = form.layers; layer-- > 0;) {
    std::vector<at::Tensor> below;
    for (int64_t d = 0; layer && d < form.directions(); ++d)
      below.push_back(
          outputs({x, active}, states[static_cast<size_t>((layer - 1) * form.directions() + d)]));
    const at::Tensor input = layer ? at::cat(below, -1) : x;
    const auto parts = gradient.chunk(form.directions(), -1);
    gradient = at::zeros_like(input);
    for (int64_t d = 0; d < form.directions(); ++d) {
      const int64_t place = layer * form.directions() + d;
      const auto g = run({input, active, d == 1}, form.weights(parameters, place), place,
                         parts[static_cast<size_t>(d)]);
      gradient = at::add(gradient, g.x);
      const size_t first = static_cast<size_t>(place) * (form.biases ? 4 : 2);
      dparameters[first] = g.weights.input;
      dparameters[first + 1] = g.weights.hidden;
      if (form.biases)
        dparameters[first + 2] = g.weights.input_bias,
                            dparameters[first + 3] = g.weights.hidden_bias;
    }
  }
  return gradient;
}

at::Tensor or_zeros(OptionalIn gradient, In like) {
  return gradient ? *gradient : at::zeros_like(like);
}

}  // namespace

OP(aclnnLSTM, [](In x, Ins parameters, Ins hx, OptionalIn batch_sizes, bool biases, int64_t layers,
                 double dropout, bool train, bool bidirectional, bool batch_first, Out y, Out h,
                 Out c, Outs i, Outs j, Outs f, Outs o, Outs hs, Outs cs, Outs tanhc) {
  const Form form = form_of(biases, layers, bidirectional, batch_first, parameters);
  refuse_dropout(dropout, train, form);
  const at::Tensor sequence = time_first(x, form, batch_sizes);
  std::vector<at::Tensor> last_h, last_c;
  const auto run = [&](const Sequence& s, const Weights& w, int64_t place) {
    const LstmSteps k = lstm_forward(s, w, hx[0][place], hx[1][place]);
    last_h.push_back(last_state(s, k.h)), last_c.push_back(last_state(s, k.c));
    const auto at = static_cast<size_t>(place);
    if (train) {
      i[at] = k.gates.i, j[at] = k.gates.j, f[at] = k.gates.f, o[at] = k.gates.o,
      tanhc[at] = k.gates.tanhc;
      hs[at] = k.h, cs[at] = k.c;
    }
    return k.h;
  };
  y = as_given(forward_layers(sequence, active_steps(sequence, batch_sizes), form, parameters, run),
               form, batch_sizes, y);
  h = at::stack(last_h), c = at::stack(last_c);
})
// The null pointer before the outputs is said to be a mask of the wanted gradients.
OP(aclnnLstmBackward, [](In x, Ins hx, Ins parameters, OptionalIn dy, OptionalIn dh, OptionalIn dc,
                         Ins i, Ins j, Ins f, Ins o, Ins hs, Ins cs, Ins tanhc,
                         OptionalIn batch_sizes, bool biases, int64_t layers, double dropout,
                         bool train, bool bidirectional, bool batch_first, Bools, Out dx, Out dh0,
                         Out dc0, Outs dparameters) {
  const Form form = form_of(biases, layers, bidirectional, batch_first, parameters);
  refuse_dropout(dropout, train, form);
  const at::Tensor sequence = time_first(x, form, batch_sizes);
  const at::Tensor gy = dy ? time_first(*dy, form, batch_sizes)
                           : at::zeros_like(hs[0]).repeat({1, 1, form.directions()});
  const at::Tensor gh = or_zeros(dh, hx[0]), gc = or_zeros(dc, hx[1]);
  const auto run = [&](const Sequence& s, const Weights& w, int64_t place, In by_y) {
    const auto at = static_cast<size_t>(place);
    const LstmSteps k{{i[at], j[at], f[at], o[at], tanhc[at]}, hs[at], cs[at]};
    const auto g = lstm_backward(s, w, hx[0][place], hx[1][place], k, by_y, gh[place], gc[place]);
    dh0->select(0, place).copy_(g.h), dc0->select(0, place).copy_(g.c);
    dh0.touch(), dc0.touch();
    return g;
  };
  dx = as_given(backward_layers(sequence, active_steps(sequence, batch_sizes), form, parameters, hs,
                                gy, dparameters, run),
                form, batch_sizes, dx);
})
OP(aclnnGRU, [](In x, Ins parameters, In hx, OptionalIn batch_sizes, bool biases, int64_t layers,
                double dropout, bool train, bool bidirectional, bool batch_first, Out y, Out h,
                Outs r, Outs z, Outs n, Outs hidden_n, Outs hs) {
  const Form form = form_of(biases, layers, bidirectional, batch_first, parameters);
  refuse_dropout(dropout, train, form);
  const at::Tensor sequence = time_first(x, form, batch_sizes);
  std::vector<at::Tensor> last;
  const auto run = [&](const Sequence& s, const Weights& w, int64_t place) {
    const GruSteps k = gru_forward(s, w, hx[place]);
    last.push_back(last_state(s, k.h));
    const auto at = static_cast<size_t>(place);
    if (train) r[at] = k.r, z[at] = k.z, n[at] = k.n, hidden_n[at] = k.hidden_n, hs[at] = k.h;
    return k.h;
  };
  y = as_given(forward_layers(sequence, active_steps(sequence, batch_sizes), form, parameters, run),
               form, batch_sizes, y);
  h = at::stack(last);
})
OP(aclnnGRUBackward, [](In x, Ins parameters, In hx, In dy, In dh, Ins r, Ins z, Ins n,
                        Ins hidden_n, Ins hs, OptionalIn batch_sizes, bool biases, int64_t layers,
                        bool bidirectional, bool batch_first, Out dx, Out dh0, Outs dparameters) {
  const Form form = form_of(biases, layers, bidirectional, batch_first, parameters);
  const at::Tensor sequence = time_first(x, form, batch_sizes);
  const auto run = [&](const Sequence& s, const Weights& w, int64_t place, In by_y) {
    const auto at = static_cast<size_t>(place);
    const auto g =
        gru_backward(s, w, hx[place], {r[at], z[at], n[at], hidden_n[at], hs[at]}, by_y, dh[place]);
    dh0->select(0, place).copy_(g.h);
    dh0.touch();
    return g;
  };
  dx = as_given(backward_layers(sequence, active_steps(sequence, batch_sizes), form, parameters, hs,
                                time_first(dy, form, batch_sizes), dparameters, run),
                form, batch_sizes, dx);
})

// `gates` keeps the four activated gates for the derivative.
OP(aclnnThnnFusedLstmCell, [](In from_x, In from_h, In c, OptionalIn input_bias,
                              OptionalIn hidden_bias, Out h, Out next, Out gates) {
  const at::Tensor sums = at::add(from_x, from_h);
  const LstmGates k = lstm_gates(input_bias ? sums + *input_bias + *hidden_bias : sums, c);
  h = k.o * k.tanhc, next = next_cell(k, c), gates = at::cat({k.i, k.f, k.j, k.o}, -1);
})
OP(aclnnThnnFusedLstmCellBackward, [](OptionalIn dh, OptionalIn dc, In c, In next, In gates,
                                      bool has_bias, Out dgates, Out dc0, OptionalOut dbias) {
  const auto parts = gates.chunk(4, -1);
  const LstmGates k{parts[0], parts[2], parts[1], parts[3], at::tanh(next)};
  const at::Tensor by_h = or_zeros(dh, c), cell = cell_gradient(k, by_h, or_zeros(dc, c));
  const at::Tensor d = gates_gradient(k, c, by_h, cell);
  dgates = d, dc0 = cell * k.f;
  if (has_bias) dbias = d.sum(0);
})

}  // namespace softnpu
