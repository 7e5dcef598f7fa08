"""Weights as modules, so that module paths equal checkpoint names; routed experts: experts.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import nn

from dsv4_ascend.weights.activations import ActivationFormat, Rows
from dsv4_ascend.weights.formats import WEIGHTS, Format, Shared, Stored, Weight, as_stored


def empty_parameter(*shape: int) -> nn.Parameter:
    """A placeholder on the meta device, replaced when weights are loaded or initialised."""
    return nn.Parameter(torch.empty(shape, device="meta"))


_S = TypeVar("_S", bound=Stored)


class StoredModule(nn.Module, Generic[_S]):
    """A weight as stored: `weight`, and `scale` or None for floats, in a format of `classes`."""

    scale: nn.Parameter | None

    def __init__(self, classes: Mapping[Format, type[_S]], *shape: int) -> None:
        super().__init__()
        self._classes = classes
        self._kept: type[_S] | None = None
        self.weight = empty_parameter(*shape)
        self.register_parameter("scale", None)

    def stored(self) -> _S:
        """The weight in its format."""
        if self._kept is not None:
            return self._kept(self.weight, self.scale)
        return as_stored(self._classes, self.weight, self.scale)

    def keep(self, weight: _S) -> None:
        """Have this weight, in its own class, instead of what the checkpoint stores."""
        for leaf, tensor in (("weight", weight.weight), ("scale", weight.scale)):
            setattr(
                self, leaf, None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            )
        self._kept = type(weight)


class Linear(StoredModule[Weight]):
    """`y = x Wᵀ`; activations: what the input of a quantised weight is quantised to."""

    def __init__(self, n: int, k: int, activations: ActivationFormat) -> None:
        super().__init__(WEIGHTS, n, k)
        self.activations = activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, K] -> [T, N] in x's dtype."""
        return self.stored().matmul(x, self.activations)


class NormedRows:
    """Rows [T, K] after a norm, in the form that each weight's product takes, made once each."""

    def __init__(self, x: torch.Tensor, norm: torch.Tensor, eps: float) -> None:
        self._of = x, norm, eps
        self._made: dict[tuple[type[Weight], str], Rows] = {}

    def detached(self) -> NormedRows:
        """The same rows, cut off from what they were made of."""
        x, norm, eps = self._of
        return NormedRows(x.detach(), norm.detach(), eps)

    def of(self, linear: Linear) -> Rows:
        """The rows as that weight takes them."""
        weight, like = linear.stored(), linear.activations
        form = type(weight), like.name
        if form not in self._made:
            self._made[form] = weight.normed_rows(*self._of, like)
        return self._made[form]

    def times(self, linear: Linear) -> torch.Tensor:
        """`x Wᵀ`: [T, N]."""
        return linear.stored().product(*self.of(linear))


class RMSNormWeight(nn.Module):
    """Holder of a norm's `weight` [d], so that module paths equal checkpoint names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = empty_parameter(d)


class SharedExpert(nn.Module):
    """w1 (gate), w3 (up) `[m, d]`,
    w2 (down) `[d, m]` of the expert that every token takes (5.2).
    """

    def __init__(self, d: int, m: int, activations: ActivationFormat) -> None:
        super().__init__()
        self.w1, self.w3 = Linear(m, d, activations), Linear(m, d, activations)
        self.w2 = Linear(d, m, activations)

    def forward(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        """X [T, d] -> [T, d], SwiGLU clamped at `limit`."""
        w1, w3, w2 = self.stored()
        return w1.mlp(w3, w2, x, limit, self.w1.activations)

    def stored(self) -> Shared:
        """Its matrices in their formats."""
        return Shared(self.w1.stored(), self.w3.stored(), self.w2.stored())
