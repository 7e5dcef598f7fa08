"""Forward and backward of torch.nn's modules and losses on npu and on the CPU."""

import os
import sys

import torch
import torch_npu  # noqa: F401
from seeds import seed
from torch import nn

torch.set_num_threads(1)
A5 = os.environ.get("SOFTNPU_SOC", "").startswith("Ascend950")
generator = torch.Generator().manual_seed(seed("inputs"))


def floats(*shape):
    return torch.randn(*shape, generator=generator)


def below(high, *shape):
    return torch.randint(0, high, shape, generator=generator)


rows, sequence, image, volume = (
    floats(4, 6),
    floats(3, 4, 8),
    floats(2, 4, 8, 8),
    floats(2, 4, 4, 4, 4),
)
shares, signs, logs = (
    torch.rand(4, 6, generator=generator),
    below(2, 4, 6).float() * 2 - 1,
    rows.log_softmax(-1),
)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Ctc(nn.CTCLoss):
    def forward(self, x):
        return super().forward(
            x.log_softmax(-1), torch.tensor([[1, 2, 2], [3, 4, 0]]), (12, 9), (3, 2)
        )


class Recurrent(nn.Module):
    """All outputs of a recurrent layer in one row, from states that are learnt."""

    def __init__(self, layer, batch, dtype=torch.float32):
        super().__init__()
        self.layer, self.dtype = layer, dtype
        shape = [layer.num_layers * (1 + layer.bidirectional), batch, layer.hidden_size]
        self.states = nn.ParameterList(
            torch.randn(shape) for _ in range(1 + isinstance(layer, nn.LSTM))
        )
        self.to(dtype)

    def forward(self, x):
        states = tuple(self.states)
        y, last = self.layer(x.to(self.dtype), states if len(states) == 2 else states[0])
        return torch.cat(
            [part.flatten().float() for part in (y, *(last if isinstance(last, tuple) else [last]))]
        )


class Packed(nn.Module):
    """Three sequences of 4, 2 and 1 steps, from learnt states.
    Of the results, the outputs only: torch_npu's other gradients are wrong.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        shape = [layer.num_layers * (1 + layer.bidirectional), 3, layer.hidden_size]
        self.states = nn.ParameterList(torch.randn(shape) for _ in range(2))

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x.detach(), [4, 2, 1], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(
            self.layer(packed, tuple(self.states))[0], batch_first=True
        )[0]


FORMS = {
    "": {},
    "batch first": dict(batch_first=True),
    "bare": dict(bias=False),
    "of both directions": dict(bidirectional=True),
    "of 3 layers": dict(num_layers=3),
    "of 2 layers in both directions": dict(num_layers=2, bidirectional=True, bias=False),
}
MODULES = {
    **{
        name: (getattr(nn, name), rows)
        for name in [
            "CELU",
            "ELU",
            "GELU",
            "GLU",
            "Hardshrink",
            "Hardsigmoid",
            "Hardswish",
            "Hardtanh",
            "LeakyReLU",
            "LogSigmoid",
            "Mish",
            "PReLU",
            "ReLU",
            "ReLU6",
            "SELU",
            "Sigmoid",
            "SiLU",
            "Softplus",
            "Softshrink",
            "Softsign",
            "Tanh",
            "Tanhshrink",
        ]
    },
    "Threshold": (lambda: nn.Threshold(0.1, 1.0), rows),
    **{
        name: (lambda name=name: getattr(nn, name)(-1), rows)
        for name in ("Softmax", "LogSoftmax", "Softmin")
    },
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), sequence),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), image),
    "Conv3d": (lambda: nn.Conv3d(4, 2, 3), volume),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), sequence),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), image),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), sequence),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1), image),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), volume),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), sequence),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), image),
    "AvgPool2d by 3": (lambda: nn.AvgPool2d(2, divisor_override=3), image),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), volume),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(3), sequence),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), image),
    "AdaptiveAvgPool2d to 1": (lambda: nn.AdaptiveAvgPool2d(1), image),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), sequence),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), image),
    "BatchNorm2d fixed": (lambda: nn.BatchNorm2d(4).eval(), image),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), image),
    "GroupNorm bare": (lambda: nn.GroupNorm(2, 4, affine=False), image),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), image),
    "LayerNorm": (lambda: nn.LayerNorm(6), rows),
    "LayerNorm bare": (lambda: nn.LayerNorm(6, elementwise_affine=False), rows),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), image),
    "RMSNorm": (lambda: nn.RMSNorm(6), rows),
    "Linear": (lambda: nn.Linear(8, 3), sequence),
    "Linear bare": (lambda: nn.Linear(8, 3, bias=False), sequence),
    "Bilinear": (lambda: nn.Bilinear(6, 6, 3), rows, floats(4, 6)),
    "Embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), below(9, 3, 4)),
    "Embedding by frequency": (lambda: nn.Embedding(9, 5, scale_grad_by_freq=True), below(9, 3, 4)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 5), below(9, 3, 4)),
    "GRUCell": (lambda: nn.GRUCell(6, 5), rows),
    "RNNCell": (lambda: nn.RNNCell(6, 5), rows),
    **{
        f"{kind.__name__} {form}": (
            lambda kind=kind, form=form: Recurrent(
                kind(8, 5, **FORMS[form]), 3 if form == "batch first" else 4
            ),
            sequence,
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for form in FORMS
    },
    "LSTM packed": (lambda: Packed(nn.LSTM(8, 5, batch_first=True)), sequence),
    "MultiheadAttention": (lambda: SelfAttention(8, 2, batch_first=True), sequence),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
        sequence,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0),
        sequence,
        floats(5, 4, 8),
    ),
    "Unfold": (lambda: nn.Unfold(3), image),
    "Fold": (lambda: nn.Fold((4, 4), 2), floats(1, 8, 9)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), image),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), image),
    "Upsample bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), image),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), image),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), image),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), image),
    "CTCLoss": (lambda: Ctc(), floats(12, 2, 7)),
    "SoftMarginLoss": (nn.SoftMarginLoss, rows, signs),
    "Upsample bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), image),
    "Upsample trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), volume),
    "CosineSimilarity": (nn.CosineSimilarity, rows, floats(4, 6)),
    "PairwiseDistance": (nn.PairwiseDistance, rows, floats(4, 6)),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), rows, below(6, 4)),
    "CrossEntropyLoss weighted": (
        lambda: nn.CrossEntropyLoss(weight=torch.rand(6), ignore_index=2, reduction="sum"),
        rows,
        below(6, 4),
    ),
    "CrossEntropyLoss of shares": (nn.CrossEntropyLoss, rows, shares),
    "NLLLoss": (nn.NLLLoss, logs, below(6, 4)),
    "NLLLoss of images": (nn.NLLLoss, floats(2, 3, 4, 4), below(3, 2, 4, 4)),
    **{
        name: (getattr(nn, name), rows, shares)
        for name in [
            "BCEWithLogitsLoss",
            "HuberLoss",
            "L1Loss",
            "MSELoss",
            "MultiLabelSoftMarginLoss",
            "PoissonNLLLoss",
            "SmoothL1Loss",
        ]
    },
    "BCEWithLogitsLoss weighted": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(6), weight=torch.rand(6)),
        rows,
        shares,
    ),
    "BCELoss": (nn.BCELoss, shares, torch.rand(4, 6, generator=generator)),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="mean"), logs, shares),
    "KLDivLoss of logs": (
        lambda: nn.KLDivLoss(reduction="batchmean", log_target=True),
        logs,
        shares.log(),
    ),
    "GaussianNLLLoss": (nn.GaussianNLLLoss, rows, shares, shares),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss, rows, signs),
    "MarginRankingLoss": (nn.MarginRankingLoss, rows, shares, signs),
    "CosineEmbeddingLoss": (nn.CosineEmbeddingLoss, rows, shares, signs[:, 0]),
    "TripletMarginLoss": (nn.TripletMarginLoss, rows, shares, signs),
    "MultiMarginLoss": (nn.MultiMarginLoss, rows, below(6, 4)),
}
if A5:  # on A2 and A3 torch_npu drops `approximate`, and wants sizes that divide for the other
    MODULES["GELU tanh"] = (lambda: nn.GELU("tanh"), rows)
    MODULES["AdaptiveMaxPool2d"] = (lambda: nn.AdaptiveMaxPool2d(3), image)
else:  # torch_npu has no such functions for A5
    MODULES["LSTMCell"] = (lambda: nn.LSTMCell(6, 5), rows)
    MODULES["LSTM packed of 2 layers"] = (
        lambda: Packed(nn.LSTM(8, 5, 2, bidirectional=True, batch_first=True)),
        sequence,
    )


def run(make, inputs, device):
    """Output, gradients of the first input and of the parameters, and buffers."""
    torch.manual_seed(seed())
    module = make().to(device)
    inputs = [x.detach().clone().to(device) for x in inputs]
    if inputs[0].is_floating_point():
        inputs[0].requires_grad_()
    y = module(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(device)).sum().backward()
    results = [y, inputs[0].grad, *(p.grad for p in module.parameters()), *module.buffers()]
    return [r.detach().cpu().double() for r in results if r is not None]


problems, worst = [], 0.0
for name, (make, *inputs) in MODULES.items():
    try:
        pairs = list(zip(run(make, inputs, "cpu"), run(make, inputs, "npu"), strict=True))
        distance = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
        worst = max(worst, distance)
        if not distance <= 1e-5:
            problems.append(f"{name}: {distance}")
    except (RuntimeError, ValueError) as error:
        problems.append(f"{name}: {str(error)[:300]}")
for problem in problems:
    print("PROBLEM", problem)
print(f"modules: {len(MODULES)} forward and backward, worst {worst:.2g}, {len(problems)} problems")
sys.exit(bool(problems))
