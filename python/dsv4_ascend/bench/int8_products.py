"""Products with int8 weights at Flash dimensions, weights cold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.products import bf16, by_expert, offsets_of, routes_of
from dsv4_ascend.bench.work import Work, cold, copies, ran, rotating, size_of
from dsv4_backend.ops.int8 import dequantize_int8
from dsv4_backend.ops.token_quant import int8_token_quant

Weights = tuple[torch.Tensor, torch.Tensor]
"""Codes and their scales."""
_INT_MM = "torch _int_mm, scales"
_BEFORE = "dequantised before, torch {} linear"
_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    widened = {
        name: [dequantize_int8(*w).to(dtype) for w in stored[: copies(dtype.itemsize * n * n)]]
        for name, dtype in _FLOATS.items()
    }
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
            }
            | {
                _BEFORE.format(name): rotating(partial(F.linear, x.to(_FLOATS[name])), some)
                for name, some in widened.items()
            },
        )


def experts(of: Dimensions) -> Iterator[Work]:
    """w1 of the routed experts, rows sorted by expert: random routing, other experts every call."""
    shape = of.intermediate, of.hidden
    stored = cold(lambda: int8_weight(of.experts, *shape), of.experts * math.prod(shape))
    widened = {name: [_widened(*stored[0], dtype)] for name, dtype in _FLOATS.items()}
    one = size_of(*stored[0]) // of.experts
    for tokens in of.many:
        rows = tokens * of.chosen
        x = bf16(rows, of.hidden)
        codes, scale = int8_token_quant(x)
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
            {
                _BEFORE.format(name): rotating(
                    partial(by_expert, x.to(_FLOATS[name])), weights, routes
                )
                for name, weights in widened.items()
            },
        )


def _widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All experts [E, N, K], with temporaries of one."""
    values = torch.empty(codes.shape, dtype=dtype)
    for own, *expert in zip(values, codes, scale, strict=True):
        own.copy_(dequantize_int8(*expert))
    return values
