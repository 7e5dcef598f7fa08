"""Proof of token embedding and LM head (spec/v4.md 2.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw
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
        for tokens, vocab, d, n in (
            (0, 5, 8, 4),
            (1, 1, 1, 1),
            (7, 97, 33, 4),
            (3, 50, 4096, 4),
            (5, 12, 6, 3),
        ):
            ids = draw.integers(tokens, high=vocab, dtype=torch.int64)
            yield Case(f"{tokens}x{n}x{d}", profile, (ids, draw.normal(vocab, d, dtype=dtype), n))
        high = torch.tensor([65535, 65536, 65540, 0], dtype=torch.int32)
        yield Case("ids around 2^16", profile, (high, draw.normal(65541, 2, dtype=dtype), 4))
        special = draw.normal(4, 5, dtype=dtype)
        special[1, 0], special[2, 1], special[3] = float("nan"), float("-inf"), 0.0
        strided = draw.permutation(8)[::2] % 4
        yield Case(
            "NaN, infinity, zeros, strided", profile, (strided, special.repeat(1, 2)[:, ::2], 2)
        )


embed_streams.wrong_arguments(
    {
        "streams share the embedding": lambda a: a._replace(weight=a.weight / a.hc_mult),
        "ids cut to 16 bits": {"input_ids": lambda ids: ids % 65536},
        "id off by one": {"input_ids": lambda ids: (ids - 1).clamp(min=0)},
        "scaled by sqrt(d)": {"weight": lambda weight: weight * weight.shape[1] ** 0.5},
    }
)
embed_streams.wrong_results(
    {
        "only the first stream filled": lambda a, y: y.where(
            torch.arange(a.hc_mult).view(1, -1, 1) == 0, 0
        ),
        "channels repeated in place of streams": lambda a, y: y.mT.reshape(y.shape),
        "id 0 taken as padding": lambda a, y: y.where(a.input_ids.view(-1, 1, 1) != 0, 0),
    }
)


@lm_head.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, vocab, d in ((0, 5, 8), (1, 1, 1), (3, 7, 5), (5, 130, 257), (2, 97, 7168)):
            x = draw.normal(tokens, d, dtype=dtype)
            weight = draw.normal(vocab, d, dtype=dtype, scale=0.02)
            yield Case(f"{tokens}x{vocab}x{d}", profile, (x, weight))
        yield Case(
            "square",
            profile,
            (draw.normal(9, 64, dtype=dtype), draw.normal(64, 64, dtype=dtype, scale=0.1)),
        )
        x, weight = draw.normal(12, 48, dtype=dtype), draw.normal(16, 96, dtype=dtype, scale=0.1)
        yield Case("strided", profile, (x[::3], weight[:, ::2]))
        special = draw.normal(4, 16, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case(
            "NaN, infinity, zero row", profile, (special, draw.uniform(5, 16, low=0.1, dtype=dtype))
        )
    mixed = draw.normal(4, 64), draw.normal(11, 64, dtype=torch.bfloat16, scale=0.1)
    yield Case("fp32 activations, bf16 weight", "ideal", mixed)


lm_head.wrong_arguments(
    {
        "activations rounded to bf16": {"x": lambda x: x.bfloat16()},
        "weight rounded to bf16": {"weight": lambda weight: weight.bfloat16()},
        "last channel left out": dict.fromkeys(("x", "weight"), lambda operand: operand[:, :-1]),
        "square weight transposed": {"weight": lambda w: w.mT if w.shape[0] == w.shape[1] else w},
        "last token's logits for all": {"x": lambda x: x[-1:].expand_as(x)},
    }
)
lm_head.wrong_results(
    {
        "logits rounded to bf16": lambda a, y: y.bfloat16().float(),
        "last id never scored": lambda a, y: F.pad(y[:, :-1], (0, 1)),
    }
)
