"""Token embedding into residual streams, and the LM head (spec/v4.md 2.1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_MAX_STREAMS = 1024  # V4 has 4
_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@operator(
    "embed_streams(Tensor input_ids, Tensor weight, int hc_mult) -> Tensor",
    rows=(1,),
    arguments={"input_ids": "int [T] in [0, V)", "weight": "float [V, d]"},
    tolerance=Tolerance(reason="rows are copied, so every bit must agree"),
)
def embed_streams(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    """Embedding of every token, copied into each of the `hc_mult` residual streams.

    input_ids: [T] int, each in [0, V), checked where values can be read; weight: [V, d] float; hc_mult: 1 to 1024.
    Returns [T, hc_mult, d] in weight's dtype, the streams equal bit for bit. T = 0 gives an empty result.
    Source: spec/v4.md 2.1 step 1 [OFF-M].
    """
    return F.embedding(input_ids, weight).unsqueeze(1).repeat(1, hc_mult, 1)


@embed_streams.shapes
def _(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> None:
    if not 1 <= hc_mult <= _MAX_STREAMS:
        raise embed_streams.reject("hc_mult", hc_mult, f"1 to {_MAX_STREAMS} streams")


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


@operator(
    "lm_head(Tensor x, Tensor weight) -> Tensor",
    rows=(22,),
    arguments={"x": "float [T, d]", "weight": "float [V, d]"},
    tolerance=Tolerance(
        reason="fp32 sums of d <= 4096 products in any order differ by about 4e-7 of the sum of their magnitudes; "
        "products of bf16 values are exact in fp32",
        ideal=(2e-5, 2e-5),
        official=(2e-5, 2e-5),
    ),
)
def lm_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`logits[t, v] = sum_c x[t, c] * weight[v, c]`, the product of both arguments upcast to fp32.

    x: [T, d] float, after the final norm; weight: [V, d] float, bf16 in the checkpoint.
    Returns fp32 [T, V] whatever the input dtypes, never rounded to bf16. T = 0 gives an empty result.
    Source: spec/v4.md 2.1 step 3 and section 10 [OFF-M].
    """
    wide = compute(x)
    return F.linear(wide, weight.to(wide.dtype))


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
