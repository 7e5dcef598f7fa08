"""Weights as modules, so that module paths equal checkpoint names; routed experts: experts.py."""

from __future__ import annotations

import torch
from torch import nn

from dsv4_ascend.weights.activations import ActivationFormat
from dsv4_ascend.weights.formats import WEIGHTS, Stored, Weight, as_stored


def empty_parameter(*shape: int) -> nn.Parameter:
    """A placeholder on the meta device, replaced when weights are loaded or initialised."""
    return nn.Parameter(torch.empty(shape, device="meta"))


def keep(module: nn.Module, weight: Stored) -> None:
    """Make the tensors of `weight` the parameters `weight` and `scale` of a module."""
    for leaf, tensor in (("weight", weight.weight), ("scale", weight.scale)):
        setattr(module, leaf, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


class Linear(nn.Module):
    """`y = x Wᵀ` with `weight` and `scale` (None for floats) in a format of `formats.WEIGHTS`.

    activations: what the input of a quantised weight is quantised to.
    """

    scale: nn.Parameter | None

    def __init__(self, n: int, k: int, activations: ActivationFormat) -> None:
        super().__init__()
        self.activations = activations
        self.weight = empty_parameter(n, k)
        self.register_parameter("scale", None)
        self.kept: type[Weight] | None = None

    def stored(self) -> Weight:
        """The weight in its format."""
        if self.kept is not None:
            return self.kept(self.weight, self.scale)
        return as_stored(WEIGHTS, self.weight, self.scale)

    def keep(self, weight: Weight) -> None:
        """Have this weight, in its own class, instead of what the checkpoint stores."""
        keep(self, weight)
        self.kept = type(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, K] -> [T, N] in x's dtype."""
        return self.stored().matmul(x, self.activations)


class RMSNormWeight(nn.Module):
    """Holder of a norm's `weight` [d], so that module paths equal checkpoint names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = empty_parameter(d)


class SharedExpert(nn.Module):
    """w1 (gate), w3 (up) `[m, d]`, w2 (down) `[d, m]` of the expert that every token takes (5.2)."""

    def __init__(self, d: int, m: int, activations: ActivationFormat) -> None:
        super().__init__()
        self.w1, self.w3 = Linear(m, d, activations), Linear(m, d, activations)
        self.w2 = Linear(d, m, activations)

    def forward(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        """X [T, d] -> [T, d], SwiGLU clamped at `limit`."""
        w1, w3, w2 = self.w1.stored(), self.w3.stored(), self.w2.stored()
        return w1.mlp(w3, w2, x, limit, self.w1.activations)
