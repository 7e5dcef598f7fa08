"""Frequencies of a layer's RoPE, and what a step's tokens are turned by (spec/v4.md 1.3, 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_backend.ops.rope import rope_frequencies, rotation_rows, yarn_frequencies


def layer_frequencies(config: V4Config, ratio: int) -> torch.Tensor:
    """RoPE frequencies fp32 [rope_dim / 2] of a layer: plain for ratio 0,
    YaRN at compress_rope_theta else (1.3).
    """
    if ratio == 0:
        return rope_frequencies(config.qk_rope_head_dim, config.rope_theta)
    yarn = config.rope_scaling
    if yarn is None:
        return rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta)
    return yarn_frequencies(
        config.qk_rope_head_dim,
        config.compress_rope_theta,
        yarn.factor,
        yarn.original_max_position_embeddings,
        yarn.beta_fast,
        yarn.beta_slow,
    )


def frequencies_by_ratio(config: V4Config) -> dict[int, torch.Tensor]:
    """`layer_frequencies` of every compression ratio that the model has."""
    return {
        ratio: layer_frequencies(config, ratio) for ratio in sorted(set(config.compress_ratios))
    }


class Rotation(NamedTuple):
    """What `apply_rope` turns a step's tokens by, and back again: fp32 [T, rope_dim] each."""

    cos: torch.Tensor
    sin: torch.Tensor
    back: torch.Tensor

    @classmethod
    def at(cls, positions: torch.Tensor, inv_freq: torch.Tensor) -> Rotation:
        """Of tokens at these positions [T]."""
        cos, sin = rotation_rows(positions, inv_freq)
        return cls(cos, sin, -sin)
