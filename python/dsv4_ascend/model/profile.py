"""Conformance profiles: which values are rounded, where and to what (spec/v4.md 0.4, 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_ascend.model import ascend
from dsv4_ascend.model.paged import FLOATS, CacheFormats, Lengths, Paged
from dsv4_ascend.weights.activations import FP8_BLOCKS, UNQUANTISED, ActivationFormat
from dsv4_ascend.weights.deployed import INT8_STORAGE, MX_STORAGE, Storage
from dsv4_ascend.weights.linear import Linear
from dsv4_backend.contract import Operator
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.attention import AttentionCall, sparse_attention
from dsv4_backend.ops.hadamard import hadamard
from dsv4_backend.ops.hyper import hc_head, hc_pre
from dsv4_backend.ops.hyper_hf32 import hc_head_hf32, hc_pre_hf32
from dsv4_backend.ops.norm import head_rms_norm
from dsv4_backend.ops.quant import act_qdq, fp4_qdq

LATENT_BLOCK = 64
INDEX_BLOCK = 32


Select = Callable[[torch.Tensor, torch.Tensor, Paged, Lengths, int, int], torch.Tensor]
"""(q [T, HI, DI], weights [T, HI], keys, lengths, ratio, k) -> entries int32 [T, k], then -1."""


@dataclass(frozen=True)
class IndexFormat:
    """What the indexer's tensors are (4.5).

    keys(k [M, DI]) -> the rows that are cached; queries(q [T, HI, DI]); weights(weights_proj,
    x [T, d], the factor of 4.5 item 4) -> [T, HI]; select: how entries are scored and chosen in
    one step, None where scores are made first.
    """

    keys: Callable[[torch.Tensor], torch.Tensor]
    queries: Callable[[torch.Tensor], torch.Tensor]
    weights: Callable[[Linear, torch.Tensor, float], torch.Tensor]
    select: Select | None = None


@dataclass(frozen=True)
class Mixing:
    """Operators of hyper-connections (2.2 to 2.4): `pre` of a sub-block, `head` at the end."""

    pre: Operator[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    head: Operator[..., torch.Tensor]


@dataclass(frozen=True)
class Profile:
    """What a network rounds, beside what its operators say.

    dtype: of streams, activations and caches. activations: what the input of a quantised weight's
    product is quantised to. latent(kv [.., D], channels without RoPE): what the window's keys and
    compressed entries are when they are cached. index: of the indexer's tensors. head_norm(q
    [T, H, D], eps): the norm of queries. mixing: of hyper-connections. attend(call, what seq_lens
    are at most, None if not known, channels of RoPE): attention. caches: byte formats of cache
    parts. storage: the formats that weights are put into while loading, None for those of the
    checkpoint.
    """

    name: str
    dtype: torch.dtype
    activations: ActivationFormat
    latent: Callable[[torch.Tensor, int], torch.Tensor]
    index: IndexFormat
    head_norm: Callable[[torch.Tensor, float], torch.Tensor]
    mixing: Mixing
    attend: Callable[[AttentionCall, int | None, int], torch.Tensor]
    caches: CacheFormats = FLOATS
    storage: Storage | None = None


def _unrounded_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return kv


def _fp8_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return act_qdq(kv, LATENT_BLOCK, channels)


def _unrounded_index(x: torch.Tensor) -> torch.Tensor:
    # A Hadamard transform of both sides of a product cancels, so without rounding there is none.
    return x


def _fp4_index(x: torch.Tensor) -> torch.Tensor:
    return fp4_qdq(hadamard(x), INDEX_BLOCK)


def _scaled_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    weights: torch.Tensor = weights_proj(x)
    return weights * factor


def _attend(call: AttentionCall, max_seq_len: int | None, rope: int) -> torch.Tensor:
    return sparse_attention(*call)


_UNROUNDED = IndexFormat(_unrounded_index, _unrounded_index, _scaled_weights)
_FP4 = IndexFormat(_fp4_index, _fp4_index, _scaled_weights)
_INT8 = IndexFormat(ascend.rotate, ascend.rotate, ascend.half_weights, ascend.select)
_TOKEN_FP8 = IndexFormat(ascend.rotate, ascend.rotate, ascend.fp32_weights, ascend.select)

_FP32 = Mixing(hc_pre, hc_head)
_HF32 = Mixing(hc_pre_hf32, hc_head_hf32)

IDEAL = Profile(
    "ideal",
    torch.float32,
    UNQUANTISED,
    _unrounded_latent,
    _UNROUNDED,
    head_rms_norm,
    _FP32,
    _attend,
)
OFFICIAL = Profile(
    "official", torch.bfloat16, FP8_BLOCKS, _fp8_latent, _FP4, head_rms_norm, _FP32, _attend
)
A2A3_INT8 = Profile(
    "a2a3-int8",
    torch.bfloat16,
    UNQUANTISED,
    _unrounded_latent,
    _INT8,
    ascend.head_norm,
    _HF32,
    ascend.attend,
    CacheFormats(index_keys="indexer_int8"),
    INT8_STORAGE,
)
"""Ascend A2 and A3: W8A8, bf16 latent cache that rounds no further,
int8 index keys (spec/deployments.md 8).
"""
A5_MX = Profile(
    "a5-mx",
    torch.bfloat16,
    UNQUANTISED,
    _unrounded_latent,
    _TOKEN_FP8,
    ascend.head_norm,
    _HF32,
    ascend.attend,
    CacheFormats("kv_epilog", "indexer_token_fp8"),
    MX_STORAGE,
)
"""Ascend A5: MX-FP8, MX-FP4 experts, FP8 latent cache, e4m3 index keys (spec/deployments.md 8)."""
PROFILES = {profile.name: profile for profile in (IDEAL, OFFICIAL, A2A3_INT8, A5_MX)}


def profile_named(name: object, argument: str = "profile") -> Profile:
    """The profile of that name. ArgumentError names `argument` and the names there are."""
    if isinstance(name, str) and name in PROFILES:
        return PROFILES[name]
    *others, last = PROFILES
    raise ArgumentError(f"{argument}: found {name!r:.40}, expected {', '.join(others)} or {last}")
