#include "recurrent.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace softnpu {
namespace {

using Tensors = std::vector<at::Tensor>;

// Times in the order in which the direction visits them.
std::vector<int64_t> visits(const Sequence& s) {
  std::vector<int64_t> result;
  const int64_t length = s.x.size(0);
  for (int64_t i = 0; i < length; ++i) result.push_back(s.reverse ? length - 1 - i : i);
  return result;
}

at::Tensor choose(const Sequence& s, int64_t t, In active, In otherwise) {
  return s.active.defined() ? at::where(s.active[t], active, otherwise) : active;
}

at::Tensor stack(const Tensors& steps) { return at::stack(steps, 0); }

at::Tensor rows(In gates, In values) {  // the gradient of a weight, summed over time and batch
  return at::matmul(gates.flatten(0, 1).t(), values.flatten(0, 1));
}

at::Tensor sum_rows(In gates) { return gates.flatten(0, 1).sum(0); }

at::Tensor sigmoid_slope(In y) { return at::mul(y, 1 - y); }
at::Tensor tanh_slope(In y) { return 1 - at::mul(y, y); }

// The state that each step started from.
at::Tensor before(const Sequence& s, In states, In first) {
  const at::Tensor start = first.unsqueeze(0);
  const int64_t length = s.x.size(0);
  return s.reverse ? at::cat({states.slice(0, 1), start})
                   : at::cat({start, states.slice(0, 0, length - 1)});
}

}  // namespace

at::Tensor outputs(const Sequence& s, In h) {
  return s.active.defined() ? at::where(s.active, h, at::zeros_like(h)) : h;
}

at::Tensor last_state(const Sequence& s, In h) { return h[visits(s).back()]; }

LstmGates lstm_gates(In sums, In c) {
  const auto parts = sums.chunk(4, -1);
  LstmGates k{
      at::sigmoid(parts[0]), at::tanh(parts[2]), at::sigmoid(parts[1]), at::sigmoid(parts[3]), {}};
  k.tanhc = at::tanh(next_cell(k, c));
  return k;
}

at::Tensor next_cell(const LstmGates& k, In c) { return k.f * c + k.i * k.j; }

at::Tensor cell_gradient(const LstmGates& k, In dh, In dc) {
  return dc + dh * k.o * tanh_slope(k.tanhc);
}

at::Tensor gates_gradient(const LstmGates& k, In c_before, In dh, In cell) {
  return at::cat({cell * k.j * sigmoid_slope(k.i), cell * c_before * sigmoid_slope(k.f),
                  cell * k.i * tanh_slope(k.j), dh * k.tanhc * sigmoid_slope(k.o)},
                 -1);
}

LstmSteps lstm_forward(const Sequence& s, const Weights& w, In h0, In c0) {
  const auto length = static_cast<size_t>(s.x.size(0));
  Tensors i(length), j(length), f(length), o(length), tanhc(length), hs(length), cs(length);
  at::Tensor h = h0, c = c0;
  for (const int64_t t : visits(s)) {
    const auto at = static_cast<size_t>(t);
    const LstmGates k = lstm_gates(
        at::linear(s.x[t], w.input, w.input_bias) + at::linear(h, w.hidden, w.hidden_bias), c);
    i[at] = k.i, j[at] = k.j, f[at] = k.f, o[at] = k.o, tanhc[at] = k.tanhc;
    h = hs[at] = choose(s, t, k.o * k.tanhc, h);
    c = cs[at] = choose(s, t, next_cell(k, c), c);
  }
  return {{stack(i), stack(j), stack(f), stack(o), stack(tanhc)}, stack(hs), stack(cs)};
}

RecurrentGradients lstm_backward(const Sequence& s, const Weights& w, In h0, In c0,
                                 const LstmSteps& k, In dy, In dh0, In dc0) {
  const at::Tensor c_before = before(s, k.c, c0);
  Tensors gates(static_cast<size_t>(s.x.size(0)));
  at::Tensor dh = dh0, dc = dc0;
  const auto order = visits(s);
  for (auto step = order.rbegin(); step != order.rend(); ++step) {
    const int64_t t = *step;
    const at::Tensor total = dh + dy[t], cell = cell_gradient(k.gates[t], total, dc);
    const at::Tensor d = gates_gradient(k.gates[t], c_before[t], total, cell);
    gates[static_cast<size_t>(t)] = choose(s, t, d, at::zeros_like(d));
    dh = choose(s, t, at::matmul(d, w.hidden), dh);
    dc = choose(s, t, cell * k.gates.f[t], dc);
  }
  const at::Tensor all = stack(gates), bias = sum_rows(all);
  return {at::matmul(all, w.input),
          dh,
          dc,
          {rows(all, s.x), rows(all, before(s, k.h, h0)), bias, bias}};
}

GruSteps gru_forward(const Sequence& s, const Weights& w, In h0) {
  const auto length = static_cast<size_t>(s.x.size(0));
  Tensors r(length), z(length), n(length), hidden_n(length), hs(length);
  at::Tensor h = h0;
  for (const int64_t t : visits(s)) {
    const auto at = static_cast<size_t>(t);
    const auto from_x = at::linear(s.x[t], w.input, w.input_bias).chunk(3, -1);
    const auto from_h = at::linear(h, w.hidden, w.hidden_bias).chunk(3, -1);
    r[at] = at::sigmoid(from_x[0] + from_h[0]);
    z[at] = at::sigmoid(from_x[1] + from_h[1]);
    hidden_n[at] = from_h[2];
    n[at] = at::tanh(from_x[2] + r[at] * from_h[2]);
    h = hs[at] = choose(s, t, (h - n[at]) * z[at] + n[at], h);
  }
  return {stack(r), stack(z), stack(n), stack(hidden_n), stack(hs)};
}

RecurrentGradients gru_backward(const Sequence& s, const Weights& w, In h0, const GruSteps& k,
                                In dy, In dh0) {
  const at::Tensor h_before = before(s, k.h, h0);
  const auto length = static_cast<size_t>(s.x.size(0));
  Tensors by_input(length), by_hidden(length);
  at::Tensor dh = dh0;
  const auto order = visits(s);
  for (auto step = order.rbegin(); step != order.rend(); ++step) {
    const int64_t t = *step;
    const auto at = static_cast<size_t>(t);
    const at::Tensor total = dh + dy[t];
    const at::Tensor dn = total * (1 - k.z[t]) * tanh_slope(k.n[t]);
    const at::Tensor dz = total * (h_before[t] - k.n[t]) * sigmoid_slope(k.z[t]);
    const at::Tensor dr = dn * k.hidden_n[t] * sigmoid_slope(k.r[t]);
    const at::Tensor from_x = at::cat({dr, dz, dn}, -1),
                     from_h = at::cat({dr, dz, dn * k.r[t]}, -1);
    by_input[at] = choose(s, t, from_x, at::zeros_like(from_x));
    by_hidden[at] = choose(s, t, from_h, at::zeros_like(from_h));
    dh = choose(s, t, at::matmul(from_h, w.hidden) + total * k.z[t], dh);
  }
  const at::Tensor from_x = stack(by_input), from_h = stack(by_hidden);
  return {at::matmul(from_x, w.input),
          dh,
          {},
          {rows(from_x, s.x), rows(from_h, h_before), sum_rows(from_x), sum_rows(from_h)}};
}

}  // namespace softnpu
