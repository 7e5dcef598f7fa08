"""Proof of the indexer's prologs (spec/deployments.md 8): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, Operator
from dsv4_backend.faults import Edits, Steps, on_bytes
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.indexer_prolog import (
    fp32_weights,
    indexer_prolog_fp8,
    indexer_prolog_int8,
    rotate,
)
from dsv4_backend.ops.int8 import quantize_weight_int8, scaled
from dsv4_backend.ops.mx import MX_BLOCK, quantize_weight_mxfp8
from dsv4_backend.ops.qkv_norm_rope import norm_rope
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.rope import apply_rope, rope_frequencies, rotation_rows
from dsv4_backend.ops.token_quant import int8_token_quant
from dsv4_backend.proofs.bounds import E4M3_RATIOS, INT8_RATIOS
from dsv4_backend.proofs.byte_entries import ENTRIES, write_entry
from dsv4_backend.proofs.cache import draw_slots, slot_faults
from dsv4_backend.proofs.int8 import SAME_SCALED, SAME_SUMS
from dsv4_backend.proofs.mx import exact_sum
from dsv4_backend.proofs.numerics import (
    BF16,
    E4M3,
    Array,
    cast,
    far_from_bf16_ties,
    hadamard_signs,
    rms_normed,
    round_to,
    wide,
)
from dsv4_backend.proofs.qkv_norm_rope import turned
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE
from dsv4_backend.proofs.token_quant import SAME_CODES, int8_codes


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


def _int8_product(qr: Array, qr_scale: Array, wq_b: Array, wq_b_scale: Array) -> Array:
    sums = qr.astype(np.int64) @ wq_b.astype(np.int64).T
    scales = wq_b_scale.astype(np.float32)[None], qr_scale.astype(np.float32)[:, None]
    return wide(sums.astype(np.float32) * scales[0] * scales[1])


def _int8_row(row: Array) -> tuple[Array, np.float32]:
    step = np.abs(row).max() / np.float32(127)
    return int8_codes(row / step) if step > 0 else np.zeros(row.shape, np.int8), step


def _fp8_row(row: Array) -> tuple[Array, np.float32]:
    step = np.abs(row).max() / np.float32(448)
    return cast(E4M3, wide(row / step) if step > 0 else wide(row)), step


class _Form(NamedTuple):
    """What the operators differ in: products of queries, exact but for bf16; codes and scale of a
    bf16 row as fp32; what scales and weights are rounded to; latent rows and weights of cases.
    """

    contract: Operator
    profile: str
    keys: str
    scale_bytes: int
    product: Callable[..., Array]
    row: Callable[[Array], tuple[Array, np.float32]]
    factors: type
    latents: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    weight: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def queries(self, a: Any) -> Array:
        """float64 [T, HI, D] before RoPE, not rounded."""
        values = self.product(a.qr, a.qr_scale, a.wq_b, a.wq_b_scale)
        width = a.pooled.shape[1]
        return values.reshape(len(a.qr), len(a.wq_b) // width, width)

    def run(self, a: Any) -> tuple[Array, Array, Array]:
        """Row by row: what is rounded is a bf16 value after RoPE, and one after the +-1 matrix."""
        width = a.pooled.shape[1]
        signs, entry = hadamard_signs(width), ENTRIES[self.keys](width, 0)
        lengths = round_to(BF16, rms_normed(a.pooled, a.k_norm, a.eps))
        keys = round_to(BF16, turned(lengths, a.entry_cos, a.entry_sin))
        for key, slot in zip(keys, a.slots.tolist(), strict=True):
            if slot != -1:
                place = a.cache[slot // a.block_size], a.block_size, slot % a.block_size
                write_entry(entry, *place, round_to(BF16, signs @ key))
        queries = round_to(BF16, turned(round_to(BF16, self.queries(a)), a.cos, a.sin))
        codes, scales = np.zeros(queries.shape), np.zeros(queries.shape[:2])
        for place in np.ndindex(*scales.shape):
            row = round_to(BF16, signs @ queries[place]).astype(np.float32)
            code, scales[place] = self.row(row)
            codes[place] = wide(code)
        of_codes = self.row(np.zeros(1, np.float32))[0].dtype
        weights = wide(a.x) @ wide(a.weights_proj).T
        return codes.astype(of_codes), self.rounded(scales), self.rounded(weights)

    def rounded(self, x: Array) -> Array:
        """As the operator returns them: fp16, or fp32 as float64."""
        return x.astype(np.float32).astype(np.float16) if self.factors is np.float16 else wide(x)


def _are_decided(rows: Array, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether sums of fp32 in any order give every bf16 value of rows before their rounding."""
    rotated = turned(round_to(BF16, rows), cos.numpy(), sin.numpy())
    products = round_to(BF16, rotated) @ hadamard_signs(rows.shape[-1])
    return all(map(far_from_bf16_ties, (rows, rotated, products)))


def _array(t: torch.Tensor) -> Array:
    """Integers as they are, floats and codes of e4m3 and e8m0 as their values."""
    return (t if t.dtype == torch.int8 else t.float()).numpy()


def drawn_turns(draw: Draw, rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [rows, channels] of drawn positions."""
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


def _drawn(draw: Draw, form: _Form, s: Sizes, eps: float) -> Arguments:
    qr, qr_scale = form.latents(draw.normal(s.tokens, s.inner, dtype=torch.bfloat16))
    weight = form.weight(draw.normal(s.heads * s.width, s.inner) * s.inner**-0.5)
    pages = 3
    return Arguments(
        draw.normal(s.tokens, s.hidden, dtype=torch.bfloat16),
        qr,
        qr_scale,
        *weight,
        draw.normal(s.heads, s.hidden, scale=s.hidden**-0.5, dtype=torch.bfloat16),
        draw.normal(s.entries, s.width, dtype=torch.bfloat16),
        (1 + 0.3 * draw.normal(s.width)).bfloat16(),
        eps,
        *drawn_turns(draw, s.tokens, s.rope),
        *drawn_turns(draw, s.entries, s.rope),
        draw.bytes(pages, s.block_size * (s.width + form.scale_bytes)),
        draw_slots(draw, s.entries, pages * s.block_size, s.entries // 3),
        s.block_size,
    )


def _decided(draw: Draw, form: _Form, sizes: Sizes, eps: float = 1e-6) -> Arguments:
    """Latent queries and pooled keys are drawn row by row until every value is decided."""
    a = _drawn(draw, form, sizes, eps)
    weight: Any = {name: _array(getattr(a, name)) for name in ("wq_b", "wq_b_scale")}
    arrays: Any = a._replace(**weight)
    for t in range(sizes.tokens):
        row = slice(t, t + 1)
        while True:
            latents = tuple(part[row] for part in (a.qr, a.qr_scale))
            given = arrays._replace(qr=_array(latents[0]), qr_scale=_array(latents[1]))
            if _are_decided(form.queries(given), a.cos[row], a.sin[row]):
                break
            other = form.latents(draw.normal(1, sizes.inner, dtype=torch.bfloat16))
            for part, new in zip(latents, other, strict=True):
                part.view(torch.uint8).copy_(new.view(torch.uint8))
    norm = a.k_norm.float().numpy()
    for m in range(sizes.entries):
        row = slice(m, m + 1)
        while not _are_decided(
            rms_normed(a.pooled[row].float().numpy(), norm, eps), a.entry_cos[row], a.entry_sin[row]
        ):
            a.pooled[m] = draw.normal(sizes.width, dtype=torch.bfloat16)
    return a


def _cases(draw: Draw, form: _Form) -> Iterator[Case]:
    for sizes in (
        Sizes(0, 2, 8, 4, 6, 5, 0, 3),
        Sizes(1, 1, 2, 2, 1, 1, 1, 1),
        Sizes(2, 3, 16, 6, 20, 33, 2, 4),
        Sizes(5, 2, 32, 32, 48, 64, 4, 2),
        Sizes(2, 2, 128, 64, 64, 96, 2, 16),
        Sizes(1, 3, 128, 64, 64, 256, 3, 16),
    ):
        name = "{} tokens, {} heads of {} ({} turned), {}, {} channels, {} entries in pages of {}"
        yield Case(name.format(*sizes), form.profile, tuple(_decided(draw, form, sizes)))
    large = _decided(draw, form, Sizes(2, 2, 16, 8, 24, 40, 3, 4), 0.5)
    yield Case("epsilon matters", form.profile, tuple(large))
    a = _decided(draw, form, Sizes(4, 2, 16, 8, 24, 40, 3, 4))
    strided = a._replace(
        x=torch.stack([a.x, a.x], 2)[..., 0],
        wq_b=a.wq_b.T.contiguous().T,
        pooled=torch.stack([a.pooled, a.pooled], 2)[..., 0],
    )
    yield Case("strided", form.profile, tuple(strided))
    skipped = a._replace(slots=torch.full_like(a.slots, -1))
    yield Case("every row skipped", form.profile, tuple(skipped))
    zeros = a._replace(qr=torch.zeros_like(a.qr), x=torch.zeros_like(a.x))
    yield Case("rows of zeros", form.profile, tuple(zeros))


WRONG_ROWS: dict[str, Edits] = {
    "epsilon of the keys' norm of 1": {"eps": 1.0},
    "norm of the keys left out": {"k_norm": torch.ones_like},
    "queries turned back": {"sin": torch.neg},
    "keys turned back": {"entry_sin": torch.neg},
    "keys not turned": {"entry_cos": torch.ones_like, "entry_sin": torch.zeros_like},
    "weights of the next head": {"weights_proj": lambda w: w.roll(1, 0)},
}
"""Wrong arguments of every prolog."""
_WRONG: dict[str, Edits] = {
    **WRONG_ROWS,
    **slot_faults(lambda a: a.cache.shape[0] * a.block_size),
    "page cleared first": {"cache": lambda cache: cache.zero_()},
}


def _twice_rounded(x: torch.Tensor) -> torch.Tensor:
    factor: float = x.shape[-1] ** -0.5
    return (rotate(x).float() * factor).to(x.dtype)


def _bit_reversed(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    order = [int(f"{i:0{max(n.bit_length() - 1, 1)}b}"[::-1], 2) for i in range(n)]
    mixed: torch.Tensor = rotate(x)[..., torch.tensor(order)]
    return mixed


WRONG_TURNS: dict[str, Steps] = {
    "weights in bf16": {fp32_weights: lambda x, w: fp32_weights(x, w).bfloat16().float()},
    "keys turned before the norm": {
        norm_rope: lambda x, weight, eps, cos, sin: norm_rope(
            x * weight.to(x.dtype), torch.ones_like(weight), eps, cos, sin
        )
    },
    "cosines of the next pair": {
        apply_rope.reference: lambda x, cos, sin: apply_rope.reference(x, cos.roll(2, -1), sin)
    },
}
"""Wrong steps of every prolog."""
_WRONG_STEPS: dict[str, Steps] = {
    **WRONG_TURNS,
    "Hadamard left out": {rotate: lambda x: x},
    "Hadamard with a factor and a second rounding": {rotate: _twice_rounded},
    "Hadamard in another order": {rotate: _bit_reversed},
    "signs of the next row": {sylvester: lambda like: sylvester(like).roll(1, 0)},
}
SAME_TURNS = {
    **dict.fromkeys(
        ("rms_norm: weight.to(wide.dtype) -> weight", "apply_rope: compute(tail) -> tail"),
        "a product with an fp32 factor is fp32 without the cast too",
    ),
    "apply_rope: (wide * cos + turned * sin).to(x.dtype) -> wide * cos + turned * sin": (
        "copying into x casts alike"
    ),
}
_EQUIVALENTS = {
    **SAME_TURNS,
    "rotate: compute(x) -> x": "torch's product of bf16 sums in fp32 and rounds once too",
    "sylvester: 0 -> 1": "the matrix is square and symmetric",
}
_FORMS = (
    _Form(
        indexer_prolog_int8,
        "a2a3-int8",
        "indexer_int8",
        2,
        _int8_product,
        _int8_row,
        np.float16,
        int8_token_quant.reference,
        quantize_weight_int8,
    ),
    _Form(
        indexer_prolog_fp8,
        "a5-mx",
        "indexer_token_fp8",
        4,
        exact_sum,
        _fp8_row,
        np.float32,
        lambda x: act_quant.reference(x, MX_BLOCK),
        quantize_weight_mxfp8,
    ),
)


def _prove(form: _Form) -> None:
    form.contract.oracle(lambda *given: form.run(Arguments(*given)))
    form.contract.cases(lambda draw: _cases(draw, form))
    form.contract.wrong_arguments(_WRONG)
    form.contract.wrong_steps(_WRONG_STEPS)
    form.contract.explain(_EQUIVALENTS)


for _form in _FORMS:
    _prove(_form)
indexer_prolog_int8.wrong_arguments(
    {
        "channel scales of the next": {"wq_b_scale": lambda s: s.roll(1, -1)},
        "row scales of the next": {"qr_scale": lambda s: s.roll(1, -1)},
    }
)
indexer_prolog_int8.wrong_step(
    scaled, {"queries in fp16": lambda *given: scaled(*given).half().float() * 1.001}
)
indexer_prolog_int8.no_output_fault("one NaN", "int8 codes hold no NaN")
indexer_prolog_int8.explain(
    SAME_CODES,
    SAME_SUMS,
    SAME_SCALED,
    INT8_RATIOS,
    dict.fromkeys(
        (
            "exact_product: _EXACT_TERMS -> _EXACT_TERMS + 1",
            "exact_product: _EXACT_TERMS -> _EXACT_TERMS + 1 (2)",
        ),
        "no case has so many channels",
    ),
    {
        "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX) -> x.round()": "the largest magnitude "
        "over its own scale passes 127 by less than half a step"
    },
)
indexer_prolog_fp8.wrong_arguments(
    {
        "channel scales of the next": {"wq_b_scale": on_bytes(lambda b: b.roll(1, 0))},
        "row scales of the next": {"qr_scale": on_bytes(lambda b: b.roll(1, 0))},
    }
)
indexer_prolog_fp8.equivalent(*NO_257TH_CODE)
indexer_prolog_fp8.explain(
    E4M3_RATIOS,
    {
        "round_e4m3: x.float().clamp(-E4M3_MAX, E4M3_MAX) -> x.float()": (
            "the cast to e4m3 saturates too"
        ),
        "round_e4m3: x.float() -> x": "ratios are fp32 already",
        "quantise_e4m3: over_scale(rows, scale).masked_fill(scale.isnan().unsqueeze(-1), "
        "torch.nan) -> over_scale(rows, scale)": "no row of a case is NaN",
    },
)
