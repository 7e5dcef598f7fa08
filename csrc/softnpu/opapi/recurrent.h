// Layers of LSTM and GRU cells, one direction at a time, over padded sequences [time, batch,
// features]. Gate order in rows of the weights: LSTM input, forget, cell, output; GRU reset,
// update, new, as in torch.
#pragma once

#include "op.h"

namespace softnpu {

struct Weights {
  at::Tensor input, hidden, input_bias, hidden_bias;  // biases may be undefined
};

// What runs along the sequence; `active` [time, batch, 1] is undefined when all steps are. Where a
// step is not active the state is kept and the output is zero: our reading, which gives torch's
// results.
struct Sequence {
  at::Tensor x, active;
  bool reverse = false;
};

// The activated gates of one step, or of all steps.
struct LstmGates {
  at::Tensor i, j, f, o, tanhc;
  LstmGates operator[](int64_t step) const {
    return {i[step], j[step], f[step], o[step], tanhc[step]};
  }
};
// Every tensor is [time, batch, hidden], in the order of time for both directions.
struct LstmSteps {
  LstmGates gates;
  at::Tensor h, c;
};
struct GruSteps {
  at::Tensor r, z, n, hidden_n, h;
};

struct RecurrentGradients {
  at::Tensor x, h, c;
  Weights weights;
};

LstmGates lstm_gates(In sums, In c);
at::Tensor next_cell(const LstmGates& gates, In c);
// Gradients of a step's cell, and of the sums in its gates, from that of its h and that of its c
// alone.
at::Tensor cell_gradient(const LstmGates& gates, In dh, In dc);
at::Tensor gates_gradient(const LstmGates& gates, In c_before, In dh, In cell);

LstmSteps lstm_forward(const Sequence& sequence, const Weights& weights, In h, In c);
// `dy` is by each output, `dh` and `dc` by the last states.
RecurrentGradients lstm_backward(const Sequence& sequence, const Weights& weights, In h, In c,
                                 const LstmSteps& steps, In dy, In dh, In dc);
GruSteps gru_forward(const Sequence& sequence, const Weights& weights, In h);
RecurrentGradients gru_backward(const Sequence& sequence, const Weights& weights, In h,
                                const GruSteps& steps, In dy, In dh);

at::Tensor outputs(const Sequence& sequence, In h);     // h where active
at::Tensor last_state(const Sequence& sequence, In h);  // of the step that ran last

}  // namespace softnpu
