"""Plain torch.nn training loops on npu and on the CPU: the same parameters after a few steps."""

import copy
import sys

import torch
import torch_npu  # noqa: F401
from seeds import seed
from torch import nn

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(seed("inputs"))


def floats(*shape):
    return torch.randn(*shape, generator=generator)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = x.new_zeros(x.shape[1], 8)
        for step in x:
            hidden = self.cell(step, hidden)
        return self.head(hidden)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, 2, bidirectional=True), nn.GRU(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[1][-1])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 16, padding_idx=0)
        # No bias: that of the keys has a gradient of zero, whose rounding noise adaptive optimisers
        # would blow up.
        self.layer = nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, "gelu", batch_first=True, bias=False
        )
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 17)

    def forward(self, ids):
        return self.head(self.norm(self.layer(self.embedding(ids)))).flatten(0, 1)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)),
        floats(5, 6),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.GroupNorm(2, 6),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        floats(5, 2, 8, 8),
    ),
    "gru cell": (Recurrent, floats(4, 5, 6)),
    "lstm and gru": (Layers, floats(4, 5, 6)),
    "transformer": (Tokens, torch.randint(0, 17, (3, 7), generator=generator)),
}
# With an eps that gradients of rounding size do not outweigh: their quotients would be noise.
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, eps=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, eps=1e-3),
}
LOSSES = {
    "cross entropy": lambda y, target: nn.functional.cross_entropy(y, target, label_smoothing=0.1),
    "squared": lambda y, target: nn.functional.mse_loss(
        y.softmax(-1), nn.functional.one_hot(target, y.shape[-1]).float()
    ),
    "nll": lambda y, target: nn.functional.nll_loss(y.log_softmax(-1), target, ignore_index=1),
}


def train(model, x, target, loss, optimiser, device):
    model, x, target = model.to(device), x.to(device), target.to(device)
    optimiser = OPTIMISERS[optimiser](model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 6)
    for _ in range(6):
        optimiser.zero_grad(set_to_none=True)
        LOSSES[loss](model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return [value.cpu() for value in model.state_dict().values()]


worst, count = 0.0, 0
for name, (make, x) in MODELS.items():
    for optimiser in OPTIMISERS:
        for loss in LOSSES:
            torch.manual_seed(seed(f"{name} {optimiser} {loss}"))
            model = make()
            classes = 17 if name == "transformer" else 3
            target = torch.randint(
                0, classes, (21 if name == "transformer" else 5,), generator=generator
            )
            want = train(copy.deepcopy(model), x, target, loss, optimiser, "cpu")
            got = train(copy.deepcopy(model), x, target, loss, optimiser, "npu")
            distance = max(
                (a.double() - b.double()).abs().max().item() for a, b in zip(want, got, strict=True)
            )
            count, worst = count + 1, max(worst, distance)
            if not distance <= 1e-5:
                print("PROBLEM", name, optimiser, loss, distance)
print(f"training: {count} loops, worst {worst:.2g}")
sys.exit(not worst <= 1e-5)
