"""What the lightning indexer scores with, W8A8 and int8 keys (spec/v4.md 4.5, deployments.md 8)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.cache_bytes import WRITES
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.int8 import int8_gemm
from dsv4_backend.ops.mx import mxfp8_gemm
from dsv4_backend.ops.qkv_norm_rope import TURNED, norm_rope
from dsv4_backend.ops.rope import apply_rope
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant
from dsv4_backend.relations import Relation, require, slots_in

INT8_KEYS, FP8_KEYS = WRITES["indexer_int8"], WRITES["indexer_token_fp8"]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """X [.., n] times the +-1 Hadamard matrix, rounded once: a factor would choose nothing."""
    wide = compute(x)
    return (wide @ sylvester(wide)).to(x.dtype)


def heads_of(
    product: torch.Tensor, weights_proj: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Queries bf16 [T, HI, D] of wq_b's product [T, HI*D], rotated."""
    q: torch.Tensor = product.detach().unflatten(-1, (weights_proj.shape[0], -1))
    apply_rope.reference(q, cos.detach(), sin.detach())
    return q


def fp32_weights(x: torch.Tensor, weights_proj: torch.Tensor) -> torch.Tensor:
    """Weights [T, HI] of heads, sums in fp32."""
    return x.detach().float() @ weights_proj.detach().float().T


SIDES = {
    "x": "bf16 [T, d]",
    "weights_proj": "bf16 [HI, d]",
    "pooled": "bf16 [M, D]",
    "k_norm": "bf16 [D]",
    "eps": "a number >= 0",
    "cos": "f32 [T, r]",
    "sin": "f32 [T, r]",
    "entry_cos": "f32 [M, r]",
    "entry_sin": "f32 [M, r]",
}
"""Specification lines of what every prolog takes."""
_SIDES = {
    **SIDES,
    "cache": "u8 [num_blocks, page]",
    "slots": "i64 [M]",
    "block_size": "at least 1",
}
_ARGUMENTS = (
    "Tensor x, Tensor qr, Tensor qr_scale, Tensor wq_b, Tensor wq_b_scale, Tensor weights_proj, "
    "Tensor pooled, Tensor k_norm, float eps, Tensor cos, Tensor sin, Tensor entry_cos, "
    "Tensor entry_sin, Tensor(a!) cache, Tensor slots, int block_size"
)
_RESULTS = "(Tensor q, Tensor q_scale, Tensor weights)"

HEADS = require("wq_b", "N == HI * D", "{N} rows", "{HI * D}, {HI} heads of {D} channels")


def _relations(form: str, scale_bytes: int) -> tuple[Relation, ...]:
    """Of pages of `form`, whose rows have a scale of so many bytes."""
    page = f"block_size * (D + {scale_bytes})"
    return (
        HEADS,
        require("pooled", "D >= 1 and (D & (D - 1)) == 0", "{D} channels", "a power of two"),
        TURNED,
        require(
            "cache",
            f"num_blocks >= 1 and page == {page}",
            "shape {sizes(cache)}",
            f"[num_blocks >= 1, {{{page}}}] for {{block_size}} entries of {form}",
        ),
        *slots_in("num_blocks * block_size", once=True),
    )


@operator(
    f"indexer_prolog_int8({_ARGUMENTS}) -> {_RESULTS}",
    rows=(11, 12, 21),
    arguments={
        **_SIDES,
        "qr": "i8 [T, K]",
        "qr_scale": "f32 [T]",
        "wq_b": "i8 [N, K]",
        "wq_b_scale": "f32 [N]",
    },
    relations=_relations("indexer_int8", 2),
    tolerance=Tolerance(
        reason="the cases keep every value away from the points where a code or a bf16 rounding "
        "would tip; scales are quotients of such values, rounded to fp16; weights are fp32 sums of "
        "up to 256 products in any order, rounded to fp16 (2^-10: its other neighbour)",
        **{"a2a3-int8": (1e-6, 2**-10)},
    ),
)
def indexer_prolog_int8(
    x: torch.Tensor,
    qr: torch.Tensor,
    qr_scale: torch.Tensor,
    wq_b: torch.Tensor,
    wq_b_scale: torch.Tensor,
    weights_proj: torch.Tensor,
    pooled: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry_cos: torch.Tensor,
    entry_sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, weights and keys of the indexer: products, norm, RoPE, Hadamard, int8, cache write.

    x: bf16 [T, d]; qr: int8 [T, K] with qr_scale fp32 [T] (`rms_norm_int8` of wq_a's product);
    wq_b: int8 [HI*D, K] with wq_b_scale fp32 [HI*D]; weights_proj: bf16 [HI, d]; pooled: bf16 [M,
    D], the keys as `compress_pool` gives them, D a power of two, with k_norm bf16 [D] and eps; cos,
    sin: fp32 [T, r] and entry_cos, entry_sin: fp32 [M, r], of the last r channels; cache: uint8
    [num_blocks, block_size * (D + 2)] in the format indexer_int8, mutated; slots: int64 [M], -1
    skips a row. Queries (`int8_gemm`) and keys (`rms_norm`) are rotated, multiplied by the +-1
    matrix with one rounding to bf16, and quantised per row: amax / 127. Returns q int8 [T, HI, D],
    q_scale fp16 [T, HI] and weights fp16 [T, HI] (fp32 sums, one cast), as `lightning_indexer_int8`
    takes them. A scale that fp16 does not hold has no promised value. ArgumentError (nothing
    written) for a slot outside the cache or given twice. Source: spec/v4.md 4.5 [OFF-M Indexer];
    aclnnRotateQuant, aclnnScatterPaKvCache; spec/deployments.md 8.
    """
    product = int8_gemm.reference(qr, qr_scale, wq_b, wq_b_scale)
    q = heads_of(product, weights_proj, cos, sin)
    keys = norm_rope(pooled, k_norm, eps, entry_cos, entry_sin)
    INT8_KEYS.reference(cache, rotate(keys.detach()), slots, block_size)
    codes, scale = int8_token_quant.reference(rotate(q))
    return codes, scale.half(), fp32_weights(x, weights_proj).half()


@operator(
    f"indexer_prolog_fp8({_ARGUMENTS}) -> {_RESULTS}",
    rows=(11, 12, 21),
    arguments={
        **_SIDES,
        "qr": "e4m3 [T, K]",
        "qr_scale": "e8m0 [T, K^32]",
        "wq_b": "e4m3 [N, K]",
        "wq_b_scale": "e8m0 [N, K^32]",
    },
    relations=_relations("indexer_token_fp8", 4),
    tolerance=Tolerance(
        reason="the cases keep every value away from the points where a code or a bf16 rounding "
        "would tip; scales are quotients of such values; weights are fp32 sums of up to 256 "
        "products in any order",
        **{"a5-mx": (2e-6, 2e-6)},
    ),
)
def indexer_prolog_fp8(
    x: torch.Tensor,
    qr: torch.Tensor,
    qr_scale: torch.Tensor,
    wq_b: torch.Tensor,
    wq_b_scale: torch.Tensor,
    weights_proj: torch.Tensor,
    pooled: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry_cos: torch.Tensor,
    entry_sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`indexer_prolog_int8` in MX-FP8 and e4m3.

    qr: e4m3 [T, K] with qr_scale e8m0 [T, ceil(K/32)] (`rms_norm_mx`); wq_b: e4m3 [HI*D, K] with
    wq_b_scale e8m0 [HI*D, ceil(K/32)]; cache: uint8 [num_blocks, block_size * (D + 4)] in the
    format indexer_token_fp8, mutated; the others as there. Queries are quantised by
    `fp8_token_quant`, keys as the format says. Returns q e4m3 [T, HI, D], q_scale fp32 [T, HI] and
    weights fp32 [T, HI], as `lightning_indexer_fp8` takes them. Source: spec/v4.md 4.5 [OFF-M
    Indexer]; aclnnIndexerQuantCache; spec/deployments.md 8.
    """
    product = mxfp8_gemm.reference(qr, qr_scale, wq_b, wq_b_scale)
    q = heads_of(product, weights_proj, cos, sin)
    keys = norm_rope(pooled, k_norm, eps, entry_cos, entry_sin)
    FP8_KEYS.reference(cache, rotate(keys.detach()), slots, block_size)
    codes, scale = fp8_token_quant.reference(rotate(q))
    return codes, scale, fp32_weights(x, weights_proj)
