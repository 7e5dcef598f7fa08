"""Conformance profiles: which values are rounded, where and to what (spec/v4.md 0.4, 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_ascend.weights.activations import FP8_BLOCKS, UNQUANTISED, ActivationFormat
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.hadamard import hadamard
from dsv4_backend.ops.quant import act_qdq, fp4_qdq

LATENT_BLOCK = 64
INDEX_BLOCK = 32


@dataclass(frozen=True)
class Profile:
    """What a network rounds, beside what its operators say.

    dtype: of streams, activations and caches. activations: what the input of a quantised weight's product is quantised
    to. latent(kv [.., D], channels without RoPE): what the window's keys and compressed entries are
    when they are cached. index(x [.., 128]): the same of index keys and index queries.
    """

    name: str
    dtype: torch.dtype
    activations: ActivationFormat
    latent: Callable[[torch.Tensor, int], torch.Tensor]
    index: Callable[[torch.Tensor], torch.Tensor]


def _unrounded_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return kv


def _fp8_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return act_qdq(kv, LATENT_BLOCK, channels)


def _unrounded_index(x: torch.Tensor) -> torch.Tensor:
    # A Hadamard transform of both sides of a product cancels, so without rounding there is none.
    return x


def _fp4_index(x: torch.Tensor) -> torch.Tensor:
    return fp4_qdq(hadamard(x), INDEX_BLOCK)


IDEAL = Profile("ideal", torch.float32, UNQUANTISED, _unrounded_latent, _unrounded_index)
OFFICIAL = Profile("official", torch.bfloat16, FP8_BLOCKS, _fp8_latent, _fp4_index)
PROFILES = {profile.name: profile for profile in (IDEAL, OFFICIAL)}


def profile_named(name: object, argument: str = "profile") -> Profile:
    """The profile of that name. ArgumentError names `argument` and the names there are."""
    if isinstance(name, str) and name in PROFILES:
        return PROFILES[name]
    raise ArgumentError(f"{argument}: found {name!r:.40}, expected {' or '.join(PROFILES)}")
