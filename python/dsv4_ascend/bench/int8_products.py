"""Products with int8 weights at Flash dimensions, weights cold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.products import bf16, offsets_of, routes_of
from dsv4_ascend.bench.work import Work, cold, copies, ran, rotating, size_of
from dsv4_backend.ops.int8 import dequantize_int8
from dsv4_backend.ops.token_quant import int8_token_quant

Weights = tuple[torch.Tensor, torch.Tensor]
"""Codes and their scales."""
_INT_MM = "torch _int_mm, scales"
_BEFORE = "dequantised before, torch bf16 linear"


def int8_weight(*shape: int) -> Weights:
    """Random int8 [..., N, K], a scale of values that bf16 holds per row."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    return codes, (torch.rand(shape[:-1]) / 64).bfloat16().float()


def _int_mm(x: torch.Tensor, x_scale: torch.Tensor, weight: Weights) -> torch.Tensor:
    codes, scale = weight
    return (torch._int_mm(x, codes.mT).float() * scale * x_scale[:, None]).bfloat16()


def linear(of: Dimensions) -> Iterator[Work]:
    """An int8 weight [hidden, hidden]."""
    n = of.hidden
    stored = cold(lambda: int8_weight(n, n), n * n)
    widened = [dequantize_int8(*w).bfloat16() for w in stored[: copies(2 * n * n)]]
    for tokens in of.many:
        x = bf16(tokens, n)
        codes, scale = int8_token_quant(x)
        yield Work(
            "int8_gemm",
            f"int8 linear {n} x {n}",
            tokens,
            size_of(*stored[0], codes, scale) + 2 * tokens * n,
            2 * tokens * n * n,
            ran("int8_gemm", codes, scale, *stored[0]),
            rotating(lambda w, a=(codes, scale): torch.ops.dsv4.int8_gemm(*a, *w), stored),
            {
                _INT_MM: rotating(partial(_int_mm, codes, scale), stored),
                _BEFORE: rotating(partial(F.linear, x), widened),
            },
        )


def experts(of: Dimensions) -> Iterator[Work]:
    """w1 of the routed experts, rows sorted by expert: random routing, other experts every call."""
    shape = of.intermediate, of.hidden
    stored = cold(lambda: int8_weight(of.experts, *shape), of.experts * math.prod(shape))
    one = size_of(*stored[0]) // of.experts
    for tokens in of.many:
        rows = tokens * of.chosen
        codes, scale = int8_token_quant(bf16(rows, of.hidden))
        routes = [offsets_of(of, tokens) for _ in range(routes_of(of, tokens))]
        touched = sum(int((r.diff() > 0).sum()) for r in routes) / len(routes)
        arguments = codes, scale
        yield Work(
            "int8_grouped_gemm",
            f"int8 experts {of.intermediate} x {of.hidden}, {of.chosen} of {of.experts}",
            tokens,
            int(touched * one) + size_of(*arguments) + 2 * rows * of.intermediate,
            2 * rows * math.prod(shape),
            ran("int8_grouped_gemm", *arguments, *stored[0], routes[0]),
            rotating(
                lambda w, r, a=arguments: torch.ops.dsv4.int8_grouped_gemm(*a, *w, r),
                stored,
                routes,
            ),
            {_INT_MM: rotating(partial(_by_expert, *arguments), stored, routes)},
        )


def _by_expert(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Weights,
    offsets: torch.Tensor,
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight[0].shape[1], dtype=torch.bfloat16)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            part = slice(start, end)
            y[part] = _int_mm(x[part], x_scale[part], (weight[0][e], weight[1][e]))
    return y
