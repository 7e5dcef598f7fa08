"""Proof of token embedding and LM head (spec/v4.md 2.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.embedding import embed_streams, lm_head
from dsv4_backend.proofs.numerics import Array, wide

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@embed_streams.oracle
def _(input_ids: Array, weight: Array, hc_mult: int) -> Array:
    streams = np.empty((len(input_ids), hc_mult, weight.shape[1]), weight.dtype)
    for token, token_id in enumerate(input_ids):
        for stream in range(hc_mult):
            streams[token, stream] = weight[token_id]
    return streams


@lm_head.oracle
def _(x: Array, weight: Array) -> Array:
    return wide(x) @ wide(weight).T


@embed_streams.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, vocab, d, n in ((0, 5, 8, 4), (1, 1, 1, 1), (7, 97, 33, 4), (3, 50, 4096, 4), (5, 12, 6, 3)):
            ids = draw.integers(tokens, high=vocab, dtype=torch.int64)
            yield Case(f"{tokens}x{n}x{d}", profile, (ids, draw.normal(vocab, d, dtype=dtype), n))
        high = torch.tensor([65535, 65536, 65540, 0], dtype=torch.int32)
        yield Case("ids around 2^16", profile, (high, draw.normal(65541, 2, dtype=dtype), 4))
        special = draw.normal(4, 5, dtype=dtype)
        special[1, 0], special[2, 1], special[3] = float("nan"), float("-inf"), 0.0
        strided = draw.permutation(8)[::2] % 4
        yield Case("NaN, infinity, zeros, strided", profile, (strided, special.repeat(1, 2)[:, ::2], 2))


add_output_faults(embed_streams, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


@embed_streams.fault("only the first stream filled")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    first = torch.arange(hc_mult).view(1, -1, 1) == 0
    return embed_streams.reference(input_ids, weight, hc_mult).where(first, 0)


@embed_streams.fault("channels repeated in place of streams")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    streams = embed_streams.reference(input_ids, weight, hc_mult)
    return streams.mT.reshape(streams.shape)


@embed_streams.fault("streams share the embedding")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    return embed_streams.reference(input_ids, weight / hc_mult, hc_mult)


@embed_streams.fault("ids cut to 16 bits")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    return embed_streams.reference(input_ids % 65536, weight, hc_mult)


@embed_streams.fault("id 0 taken as padding")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    return embed_streams.reference(input_ids, weight, hc_mult).where(input_ids.view(-1, 1, 1) != 0, 0)


@embed_streams.fault("id off by one")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    return embed_streams.reference((input_ids - 1).clamp(min=0), weight, hc_mult)


@embed_streams.fault("scaled by sqrt(d)")
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    return embed_streams.reference(input_ids, weight * weight.shape[1] ** 0.5, hc_mult)


@lm_head.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, vocab, d in ((0, 5, 8), (1, 1, 1), (3, 7, 5), (5, 130, 257), (2, 97, 7168)):
            x, weight = draw.normal(tokens, d, dtype=dtype), draw.normal(vocab, d, dtype=dtype, scale=0.02)
            yield Case(f"{tokens}x{vocab}x{d}", profile, (x, weight))
        yield Case("square", profile, (draw.normal(9, 64, dtype=dtype), draw.normal(64, 64, dtype=dtype, scale=0.1)))
        x, weight = draw.normal(12, 48, dtype=dtype), draw.normal(16, 96, dtype=dtype, scale=0.1)
        yield Case("strided", profile, (x[::3], weight[:, ::2]))
        special = draw.normal(4, 16, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, draw.uniform(5, 16, low=0.1, dtype=dtype)))
    mixed = draw.normal(4, 64), draw.normal(11, 64, dtype=torch.bfloat16, scale=0.1)
    yield Case("fp32 activations, bf16 weight", "ideal", mixed)


add_output_faults(lm_head, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


@lm_head.fault("logits rounded to bf16")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x, weight).bfloat16().float()


@lm_head.fault("activations rounded to bf16")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x.bfloat16(), weight)


@lm_head.fault("weight rounded to bf16")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x, weight.bfloat16())


@lm_head.fault("last channel left out")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x[:, :-1], weight[:, :-1])


@lm_head.fault("square weight transposed")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x, weight.mT if weight.shape[0] == weight.shape[1] else weight)


@lm_head.fault("last token's logits for all")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return lm_head.reference(x[-1:].expand_as(x), weight)


@lm_head.fault("last id never scored")
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.pad(lm_head.reference(x, weight[:-1]), (0, 1))
