"""Proof of the indexer's prolog in int8 (spec/deployments.md 8): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.indexer_prolog import head_weights, indexer_prolog_int8, rotate
from dsv4_backend.ops.int8 import quantize_weight_int8, scaled
from dsv4_backend.ops.qkv_norm_rope import norm_rope
from dsv4_backend.ops.rope import apply_rope, rope_frequencies, rotation_rows
from dsv4_backend.ops.token_quant import int8_token_quant
from dsv4_backend.proofs.byte_entries import ENTRIES, write_entry
from dsv4_backend.proofs.cache import draw_slots, slot_faults
from dsv4_backend.proofs.int8 import ALREADY_FP32, SAME_SCALED, SAME_SUMS
from dsv4_backend.proofs.numerics import BF16, Array, far_from_bf16_ties, round_to, wide
from dsv4_backend.proofs.qkv_norm_rope import normed, turned
from dsv4_backend.proofs.token_quant import SAME_CODES, int8_codes

PROFILE = "a2a3-int8"


class Arguments(NamedTuple):
    """Of `indexer_prolog_int8`."""

    x: torch.Tensor
    qr: torch.Tensor
    qr_scale: torch.Tensor
    wq_b: torch.Tensor
    wq_b_scale: torch.Tensor
    weights_proj: torch.Tensor
    pooled: torch.Tensor
    k_norm: torch.Tensor
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor
    entry_cos: torch.Tensor
    entry_sin: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    block_size: int


def _signs(n: int) -> Array:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    shared = np.arange(n)[:, None] & np.arange(n)
    signs = np.array([1.0 - 2.0 * (bin(bits).count("1") % 2) for bits in range(n)])
    return np.asarray(signs[shared])


def _queries(qr: Array, qr_scale: Array, wq_b: Array, wq_b_scale: Array, width: int) -> Array:
    """float64 [T, HI, D] of bf16 values."""
    sums = qr.astype(np.int64) @ wq_b.astype(np.int64).T
    scales = wq_b_scale.astype(np.float32)[None], qr_scale.astype(np.float32)[:, None]
    products = sums.astype(np.float32) * scales[0] * scales[1]
    return round_to(BF16, products).reshape(len(qr), len(wq_b) // width, width)


def _half(x: Array) -> Array:
    return x.astype(np.float32).astype(np.float16)


@indexer_prolog_int8.oracle
def _(
    x: Array,
    qr: Array,
    qr_scale: Array,
    wq_b: Array,
    wq_b_scale: Array,
    weights_proj: Array,
    pooled: Array,
    k_norm: Array,
    eps: float,
    cos: Array,
    sin: Array,
    entry_cos: Array,
    entry_sin: Array,
    cache: Array,
    slots: Array,
    block_size: int,
) -> tuple[Array, Array, Array]:
    """Row by row: what is rounded is a bf16 value after RoPE, and one after the +-1 matrix."""
    width = pooled.shape[1]
    signs, entry = _signs(width), ENTRIES["indexer_int8"](width, 0)
    keys = round_to(BF16, turned(round_to(BF16, normed(pooled, k_norm, eps)), entry_cos, entry_sin))
    for key, slot in zip(keys, slots.tolist(), strict=True):
        if slot != -1:
            place = cache[slot // block_size], block_size, slot % block_size
            write_entry(entry, *place, round_to(BF16, signs @ key))
    queries = _queries(qr, qr_scale, wq_b, wq_b_scale, width)
    queries = round_to(BF16, turned(queries, cos, sin))
    codes = np.zeros(queries.shape, np.int8)
    scales = np.zeros(queries.shape[:2])
    for place in np.ndindex(*scales.shape):
        row = round_to(BF16, signs @ queries[place]).astype(np.float32)
        step = np.abs(row).max() / np.float32(127)
        scales[place] = step
        codes[place] = int8_codes(row / step) if step > 0 else 0
    return codes, _half(scales), _half(wide(x) @ wide(weights_proj).T)


def _is_decided(a: Arguments) -> bool:
    """Whether sums of fp32 in any order give every bf16 value and every code."""
    signs = _signs(a.pooled.shape[1])
    rows = a.qr.numpy(), a.qr_scale.numpy(), a.wq_b.numpy(), a.wq_b_scale.numpy()
    queries = _queries(*rows, a.pooled.shape[1])
    keys = normed(a.pooled.float().numpy(), a.k_norm.float().numpy(), a.eps)
    if not far_from_bf16_ties(keys):
        return False
    sides = (queries, a.cos, a.sin), (round_to(BF16, keys), a.entry_cos, a.entry_sin)
    for side, cos, sin in sides:
        rotated = turned(side, cos.numpy(), sin.numpy())
        products = round_to(BF16, rotated) @ signs
        if not (far_from_bf16_ties(rotated) and far_from_bf16_ties(products)):
            return False
    return True


def _turns(draw: Draw, rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = draw.integers(rows, high=5000, dtype=torch.int64)
    return rotation_rows(positions, rope_frequencies(channels, 10000.0))


class Sizes(NamedTuple):
    """Of a case."""

    tokens: int
    heads: int
    width: int
    rope: int
    inner: int
    hidden: int
    entries: int
    block_size: int


def _drawn(draw: Draw, s: Sizes, eps: float) -> Arguments:
    qr, qr_scale = int8_token_quant.reference(draw.normal(s.tokens, s.inner, dtype=torch.bfloat16))
    weight = quantize_weight_int8(draw.normal(s.heads * s.width, s.inner) * s.inner**-0.5)
    pages = 3
    return Arguments(
        draw.normal(s.tokens, s.hidden, dtype=torch.bfloat16),
        qr,
        qr_scale,
        *weight,
        draw.normal(s.heads, s.hidden, scale=s.hidden**-0.5, dtype=torch.bfloat16),
        draw.normal(s.entries, s.width, dtype=torch.bfloat16),
        1 + 0.3 * draw.normal(s.width),
        eps,
        *_turns(draw, s.tokens, s.rope),
        *_turns(draw, s.entries, s.rope),
        draw.bytes(pages, s.block_size * (s.width + 2)),
        draw_slots(draw, s.entries, pages * s.block_size, s.entries // 3),
        s.block_size,
    )


def _decided(draw: Draw, sizes: Sizes, eps: float = 1e-6) -> Arguments:
    while not _is_decided(drawn := _drawn(draw, sizes, eps)):
        pass
    return drawn


@indexer_prolog_int8.cases
def _(draw: Draw) -> Iterator[Case]:
    for sizes in (
        Sizes(0, 2, 8, 4, 6, 5, 0, 3),
        Sizes(1, 1, 2, 2, 1, 1, 1, 1),
        Sizes(2, 3, 16, 6, 20, 33, 2, 4),
        Sizes(5, 2, 32, 32, 48, 64, 4, 2),
        Sizes(3, 4, 128, 64, 64, 96, 2, 16),
        Sizes(1, 3, 128, 64, 40, 256, 1, 16),
    ):
        name = "{} tokens, {} heads of {} ({} turned), {}, {} channels, {} entries in pages of {}"
        yield Case(name.format(*sizes), PROFILE, tuple(_decided(draw, sizes)))
    large = _decided(draw, Sizes(2, 2, 16, 8, 24, 40, 3, 4), 0.5)
    yield Case("epsilon matters", PROFILE, tuple(large))
    a = _decided(draw, Sizes(4, 2, 16, 8, 24, 40, 3, 4))
    strided = a._replace(
        x=torch.stack([a.x, a.x], 2)[..., 0],
        wq_b=a.wq_b.T.contiguous().T,
        pooled=torch.stack([a.pooled, a.pooled], 2)[..., 0],
    )
    yield Case("strided", PROFILE, tuple(strided))
    yield Case("every row skipped", PROFILE, tuple(a._replace(slots=torch.full_like(a.slots, -1))))
    zeros = a._replace(qr=torch.zeros_like(a.qr), x=torch.zeros_like(a.x))
    yield Case("rows of zeros", PROFILE, tuple(zeros))


_Edit = Callable[[torch.Tensor], torch.Tensor]
_NEXT: _Edit = lambda s: s.roll(1, -1)  # noqa: E731
indexer_prolog_int8.wrong_arguments(
    {
        **slot_faults(lambda a: a.cache.shape[0] * a.block_size),
        "page cleared first": {"cache": lambda cache: cache.zero_()},
        "epsilon of the keys' norm of 1": {"eps": 1.0},
        "norm of the keys left out": {"k_norm": torch.ones_like},
        "channel scales of the next": {"wq_b_scale": _NEXT},
        "row scales of the next": {"qr_scale": _NEXT},
        "queries turned back": {"sin": torch.neg},
        "keys turned back": {"entry_sin": torch.neg},
        "keys not turned": {"entry_cos": torch.ones_like, "entry_sin": torch.zeros_like},
        "weights of the next head": {"weights_proj": lambda w: w.roll(1, 0)},
    }
)


def _twice_rounded(x: torch.Tensor) -> torch.Tensor:
    factor: float = x.shape[-1] ** -0.5
    return (rotate(x).float() * factor).to(x.dtype)


def _bit_reversed(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    order = [int(f"{i:0{max(n.bit_length() - 1, 1)}b}"[::-1], 2) for i in range(n)]
    mixed: torch.Tensor = rotate(x)[..., torch.tensor(order)]
    return mixed


indexer_prolog_int8.wrong_steps(
    {
        "Hadamard left out": {rotate: lambda x: x},
        "Hadamard with a factor and a second rounding": {rotate: _twice_rounded},
        "Hadamard in another order": {rotate: _bit_reversed},
        "weights in bf16": {head_weights: lambda x, w: head_weights(x, w).bfloat16().half()},
        "queries in fp16": {scaled: lambda *given: scaled(*given).half().float() * 1.001},
        "keys turned before the norm": {
            norm_rope: lambda x, weight, eps, cos, sin: norm_rope(
                x * weight.to(x.dtype), torch.ones_like(weight), eps, cos, sin
            )
        },
        "signs of the first row": {
            sylvester: lambda like: sylvester(like).roll(1, 0),
        },
        "halves instead of adjacent pairs": {
            apply_rope.reference: lambda x, cos, sin: apply_rope.reference(x, cos.roll(2, -1), sin)
        },
    }
)
indexer_prolog_int8.no_output_fault("one NaN", "int8 codes hold no NaN")
_FP32 = "a product with an fp32 factor is fp32 without the cast too"
indexer_prolog_int8.explain(
    SAME_CODES,
    SAME_SUMS,
    SAME_SCALED,
    ALREADY_FP32,
    dict.fromkeys(
        ("rms_norm: weight.to(wide.dtype) -> weight", "apply_rope: compute(tail) -> tail"), _FP32
    ),
    {
        "apply_rope: (wide * cos + turned * sin).to(x.dtype) -> wide * cos + turned * sin": (
            "copying into x casts alike"
        ),
        "rotate: compute(x) -> x": "torch's product of bf16 sums in fp32 and rounds once too",
        "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX) -> x.round()": "the largest magnitude "
        "over its own scale passes 127 by less than half a step",
        "sylvester: 0 -> 1": "the matrix is square and symmetric",
    },
)
