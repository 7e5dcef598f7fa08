"""Conformance profiles: which values are rounded, where and to what (spec/v4.md 0.4, 10)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from dsv4_ascend.checkpoint.kinds import DESCRIPTION, Kind
from dsv4_ascend.model import ascend, rows
from dsv4_ascend.model.paged import FLOATS, CacheFormats, Lengths, Paged
from dsv4_ascend.model.rows import Ahead, Codes, IndexerParts, Qkv
from dsv4_ascend.weights.activations import FP8_BLOCKS, UNQUANTISED, ActivationFormat
from dsv4_ascend.weights.linear import Linear
from dsv4_ascend.weights.storage import (
    BF16_STORAGE,
    INT4_STORAGE,
    INT8_STORAGE,
    MX_STORAGE,
    Storage,
)
from dsv4_backend.contract import Operator
from dsv4_backend.errors import ArgumentError, CheckpointError
from dsv4_backend.ops.attention import AttentionCall, sparse_attention
from dsv4_backend.ops.hadamard import hadamard
from dsv4_backend.ops.hyper import hc_head, hc_pre
from dsv4_backend.ops.hyper_hf32 import hc_head_hf32, hc_pre_hf32
from dsv4_backend.ops.quant import act_qdq, fp4_qdq

LATENT_BLOCK = 64
INDEX_BLOCK = 32


Prepare = Callable[[IndexerParts, torch.Tensor, Paged], tuple[Codes, torch.Tensor]]
"""(parts, slots int64 [M], keys) -> queries and weights [T, HI]; writes the new keys."""
Select = Callable[[Codes, torch.Tensor, Paged, Lengths, int, int], torch.Tensor]
"""(queries, weights [T, HI], keys, lengths, ratio, k) -> entries int32 [T, k], then -1."""


@dataclass(frozen=True)
class IndexFormat:
    """What the indexer's tensors are (4.5), and how entries are scored and chosen in one step,
    None where scores are made first. ahead(parts, attention's wq_b) stands for `prepare` where one
    step makes both products of the latent queries; who calls it writes the keys.
    """

    prepare: Prepare | None
    select: Select | None = None
    ahead: Callable[[IndexerParts, Linear], Ahead] | None = None


@dataclass(frozen=True)
class Latents:
    """What is done between projections and caches of attention (4.2).

    project(x [T, d], wq_a, wkv) -> both products. norm_rope(rows) -> queries, keys, entries.
    joined: whether launchers turn the rows of one buffer at once.
    """

    project: Callable[[torch.Tensor, Linear, Linear], tuple[torch.Tensor, torch.Tensor]]
    norm_rope: Callable[[Qkv], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    joined: bool = False


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
    compressed entries are when they are cached. index: of the indexer's tensors. latents: of what
    lies before the caches. mixing: of hyper-connections. attend(call, what seq_lens
    are at most, None if not known, channels of RoPE): attention. caches: byte formats of cache
    parts. storage: the formats that weights are put into while loading, None for those of the
    checkpoint.
    """

    name: str
    dtype: torch.dtype
    activations: ActivationFormat
    latent: Callable[[torch.Tensor, int], torch.Tensor]
    index: IndexFormat
    latents: Latents
    mixing: Mixing
    attend: Callable[[AttentionCall, int | None, int], torch.Tensor]
    caches: CacheFormats = FLOATS
    storage: Storage | None = None


def _unrounded_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return kv


def _fp8_latent(kv: torch.Tensor, channels: int) -> torch.Tensor:
    return act_qdq(kv, LATENT_BLOCK, channels)


def _prepare(rounded: Callable[[torch.Tensor], torch.Tensor]) -> Prepare:
    """Keys and queries as floats that `rounded` gives."""

    def prepare(
        parts: IndexerParts, slots: torch.Tensor, keys: Paged
    ) -> tuple[Codes, torch.Tensor]:
        keys.write(rounded(parts.keys()), slots)
        return (rounded(parts.queries()), None), parts.weights()

    return prepare


def _unrounded_index(x: torch.Tensor) -> torch.Tensor:
    # A Hadamard transform of both sides of a product cancels, so without rounding there is none.
    return x


def _fp4_index(x: torch.Tensor) -> torch.Tensor:
    return fp4_qdq(hadamard(x), INDEX_BLOCK)


def _attend(call: AttentionCall, max_seq_len: int | None, rope: int) -> torch.Tensor:
    return sparse_attention(*call)


_UNROUNDED = IndexFormat(_prepare(_unrounded_index))
_FP4 = IndexFormat(_prepare(_fp4_index))
_CODES = IndexFormat(ascend.prolog, ascend.select)
_BF16_KEYS = IndexFormat(None, ascend.select, ascend.float_prolog)

_APART = Latents(rows.project, rows.norm_rope)
_FUSED = Latents(ascend.project, ascend.norm_rope, joined=True)

_FP32 = Mixing(hc_pre, hc_head)
_HF32 = Mixing(hc_pre_hf32, hc_head_hf32)

IDEAL = Profile(
    "ideal",
    torch.float32,
    UNQUANTISED,
    _unrounded_latent,
    _UNROUNDED,
    _APART,
    _FP32,
    _attend,
)
OFFICIAL = Profile(
    "official", torch.bfloat16, FP8_BLOCKS, _fp8_latent, _FP4, _APART, _FP32, _attend
)
BF16 = Profile(
    "bf16",
    torch.bfloat16,
    UNQUANTISED,
    _unrounded_latent,
    _BF16_KEYS,
    _FUSED,
    _HF32,
    ascend.attend,
    storage=BF16_STORAGE,
)
"""Every Ascend chip: weights, caches and index keys in bf16, nothing quantised
(spec/deployments.md 8).
"""
A2A3_INT8 = Profile(
    "a2a3-int8",
    torch.bfloat16,
    UNQUANTISED,
    _unrounded_latent,
    _CODES,
    _FUSED,
    _HF32,
    ascend.attend,
    CacheFormats(index_keys="indexer_int8"),
    INT8_STORAGE,
)
"""Ascend A2 and A3: W8A8, bf16 latent cache that rounds no further,
int8 index keys (spec/deployments.md 8).
"""
A2A3_W4A8 = replace(A2A3_INT8, name="a2a3-w4a8", storage=INT4_STORAGE)
"""The same with experts of 4 bits, which are kept in int8: W4A8."""
A5_MX = Profile(
    "a5-mx",
    torch.bfloat16,
    UNQUANTISED,
    _unrounded_latent,
    _CODES,
    _FUSED,
    _HF32,
    ascend.attend,
    CacheFormats("kv_epilog", "indexer_token_fp8"),
    MX_STORAGE,
)
"""Ascend A5: MX-FP8, MX-FP4 experts, FP8 latent cache, e4m3 index keys (spec/deployments.md 8)."""
PROFILES = {
    profile.name: profile for profile in (IDEAL, OFFICIAL, BF16, A2A3_INT8, A2A3_W4A8, A5_MX)
}


def profile_for(kinds: Collection[Kind]) -> Profile:
    """The first profile whose weights can be of all these kinds; official for none.

    CheckpointError where no profile runs their mixture.
    """
    if not kinds:
        return OFFICIAL
    for profile in PROFILES.values():
        if profile.storage is not None and profile.storage.reads(kinds):
            return profile
    names = " and ".join(sorted({kind.name for kind in kinds}))
    raise CheckpointError(f"{DESCRIPTION}: found {names} together, which no profile runs")


def profile_named(name: object, argument: str = "profile") -> Profile:
    """The profile of that name. ArgumentError names `argument` and the names there are."""
    if isinstance(name, str) and name in PROFILES:
        return PROFILES[name]
    *others, last = PROFILES
    raise ArgumentError(f"{argument}: found {name!r:.40}, expected {', '.join(others)} or {last}")
