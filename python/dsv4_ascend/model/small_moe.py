"""A layer of many small experts, to measure what calls cost: products hardly take time in it."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.profile import OFFICIAL, Profile
from dsv4_ascend.model.transformer import MoE
from dsv4_backend.ops.quant import quantize_weight_fp4, quantize_weight_fp8

SIZE = 128
"""Channels of the streams and of the experts."""


def small_moe(config: V4Config, experts: int, profile: Profile = OFFICIAL) -> MoE:
    """A layer of `config`, but for its sizes: random, in the release's formats, 6 experts a token."""
    small = dataclasses.replace(
        config,
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
            value, scale = (quantize_weight_fp4 if path.startswith("experts") else quantize_weight_fp8)(value)
            module.scale = nn.Parameter(scale, requires_grad=False)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return layer
