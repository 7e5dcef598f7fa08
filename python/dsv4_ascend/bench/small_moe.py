"""A layer of many small experts, in which products hardly take time,
and what it does beside its operators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.profile import OFFICIAL, Profile
from dsv4_ascend.model.transformer import MoE
from dsv4_backend.contract import Operator
from dsv4_backend.ops.quant import quantize_weight_fp4, quantize_weight_fp8

SIZE = 128
"""Channels of the streams and of the experts."""


def small_moe(experts: int, profile: Profile = OFFICIAL) -> MoE:
    """A layer of Flash, but for its sizes: random, in the release's formats, 6 experts a token."""
    small = dataclasses.replace(
        V4Config.flash(),
        hidden_size=SIZE,
        moe_intermediate_size=SIZE,
        n_routed_experts=experts,
        num_experts_per_tok=6,
    )
    layer = MoE(small, hashed=False, profile=profile)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module, value = layer.get_submodule(path), torch.randn(parameter.shape, generator=generator)
        if path != "gate":
            fp4 = path.startswith("experts")
            value, scale = (quantize_weight_fp4 if fp4 else quantize_weight_fp8)(value)
            module.scale = nn.Parameter(scale, requires_grad=False)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return layer


def one_token(profile: Profile = OFFICIAL) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments of the layer for T = 1."""
    return torch.ones(1, SIZE, dtype=profile.dtype), torch.zeros(1, dtype=torch.int64)


def beside_operators(layer: MoE) -> Callable[[], object]:
    """A call of the layer at T = 1 whose operators answer at once,
    with results of an earlier call.
    """
    results: list[Any] = []
    call = Operator.__call__

    def record(operator: Operator, *args: Any) -> Any:
        results.append(call(operator, *args))
        return results[-1]

    with patch.object(Operator, "__call__", record):
        layer(*one_token())

    arguments = one_token()

    def run() -> object:
        known = iter(results)
        # By hand: patch.object alone would take a third of what is measured.
        setattr(Operator, "__call__", lambda operator, *args: next(known))  # noqa: B010
        try:
            return layer(*arguments)
        finally:
            setattr(Operator, "__call__", call)  # noqa: B010

    return run
