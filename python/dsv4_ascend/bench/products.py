"""Products with weights of FP4, FP8 and bf16 at Flash dimensions, weights cold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.work import Call, Work, cold, copies, ran, rotating, size_of
from dsv4_backend.ops.quant import act_quant, dequantize_fp4, dequantize_fp8

Weights = tuple[torch.Tensor, torch.Tensor]
"""Codes and their scales."""
_BEFORE = "dequantised before, torch {}"
_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def scales(*shape: int) -> torch.Tensor:
    """E8M0 scales around 1/64."""
    return torch.randint(119, 123, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def fp8_weight(*shape: int) -> Weights:
    """Random e4m3 below 2 [..., N, K], a scale per tile of 128x128."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8) & 0xBF
    tiles = (*shape[:-2], *(-(-n // 128) for n in shape[-2:]))
    return codes.view(torch.float8_e4m3fn), scales(*tiles)


def fp4_weight(*shape: int) -> Weights:
    """Random e2m1 [..., N, K], two a byte, a scale per 32 channels."""
    codes = torch.randint(-128, 128, (*shape[:-1], shape[-1] // 2), dtype=torch.int8)
    return codes, scales(*shape[:-1], shape[-1] // 32)


def bf16(*shape: int) -> torch.Tensor:
    """Uniform in [-1, 1)."""
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1)


def experts(of: Dimensions) -> Iterator[Work]:
    """w1 of the routed experts, rows sorted by expert: random routing, other experts every call."""
    shape = of.intermediate, of.hidden
    form = of.experts, *shape
    stored = cold(lambda: fp4_weight(*form), of.experts * math.prod(shape) // 2)
    widened = {name: [_widened(*stored[0], dtype)] for name, dtype in _FLOATS.items()}
    one = size_of(*stored[0]) // of.experts
    for tokens in of.many:
        x = bf16(tokens * of.chosen, of.hidden)
        codes, scale = act_quant(x, 128)
        routes = [offsets_of(of, tokens) for _ in range(routes_of(of, tokens))]
        touched = sum(int((r.diff() > 0).sum()) for r in routes) / len(routes)
        out = 2 * x.shape[0] * of.intermediate
        arguments = codes, scale
        yield Work(
            "fp4_grouped_gemm",
            f"FP4 experts {of.intermediate} x {of.hidden}, {of.chosen} of {of.experts}",
            tokens,
            int(touched * one) + size_of(*arguments) + out,
            2 * x.shape[0] * math.prod(shape),
            ran("fp4_grouped_gemm", *arguments, *stored[0], routes[0]),
            rotating(
                lambda w, r, a=arguments: torch.ops.dsv4.fp4_grouped_gemm(*a, *w, r), stored, routes
            ),
            {
                _BEFORE.format(f"{name} linear"): rotating(
                    partial(by_expert, x.to(_FLOATS[name])), weights, routes
                )
                for name, weights in widened.items()
            },
        )


def _widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All experts [E, N, K], with temporaries of one."""
    values = torch.empty(*codes.shape[:2], 2 * codes.shape[2], dtype=dtype)
    for own, *expert in zip(values, codes, scale, strict=True):
        own.copy_(dequantize_fp4(*expert))
    return values


def routes_of(of: Dimensions, tokens: int) -> int:
    """Routings until the experts that few tokens choose have changed more than a cache holds."""
    touched = min(of.experts, tokens * of.chosen) * of.intermediate * of.hidden // 2
    return min(16, copies(touched))


def offsets_of(of: Dimensions, tokens: int) -> torch.Tensor:
    """Offsets of rows for tokens that choose `chosen` different experts each."""
    ids = torch.rand(tokens, of.experts).topk(of.chosen).indices
    counts = ids.flatten().bincount(minlength=of.experts)
    return F.pad(counts.cumsum(0), (1, 0)).int()


def by_expert(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows [T, K] times the weight [E, N, K] of their expert, one linear per expert."""
    ends = offsets.tolist()
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            y[start:end] = F.linear(x[start:end], weight[e])
    return y


def fp8_linear(of: Dimensions) -> Iterator[Work]:
    """An FP8 weight [hidden, hidden] in tiles."""
    n = of.hidden
    stored = cold(lambda: fp8_weight(n, n), n * n)
    widened = {
        name: [dequantize_fp8(*w).to(dtype) for w in stored[: copies(dtype.itemsize * n * n)]]
        for name, dtype in _FLOATS.items()
    }
    op = torch.ops.dsv4.fp8_gemm
    for tokens in of.many:
        x = bf16(tokens, n)
        arguments = tuple(act_quant(x, 128))
        each_call = {
            f"dequantised each call, torch {name} linear": rotating(
                partial(_widen_and_multiply, x.to(dtype)), stored
            )
            for name, dtype in _FLOATS.items()
        }
        for note, peers in (
            ("", _linears(x, widened, _BEFORE)),
            (", no copy of the weight", each_call),
        ):
            yield Work(
                "fp8_gemm",
                f"FP8 linear {n} x {n}{note}",
                tokens,
                size_of(*stored[0], *arguments) + 2 * tokens * n,
                2 * tokens * n * n,
                ran("fp8_gemm", *arguments, *stored[0]),
                rotating(lambda w, a=arguments: op(*a, *w), stored),
                peers,
            )


def _widen_and_multiply(x: torch.Tensor, weight: Weights) -> torch.Tensor:
    return F.linear(x, dequantize_fp8(*weight).to(x.dtype))


def _linears(x: torch.Tensor, weights: dict[str, list[torch.Tensor]], name: str) -> dict[str, Call]:
    """Linears of torch with weights in several dtypes, x in theirs."""
    return {
        name.format(f"{of} linear"): rotating(partial(F.linear, x.to(_FLOATS[of])), some)
        for of, some in weights.items()
    }


def bf16_linear(of: Dimensions) -> Iterator[Work]:
    """A bf16 weight [hidden, hidden]."""
    n = of.hidden
    stored = cold(lambda: bf16(n, n), 2 * n * n)
    weights = {"bf16": stored, "fp32": [w.float() for w in stored[: copies(4 * n * n)]]}
    for tokens in of.many:
        x = bf16(tokens, n)
        yield Work(
            "linear",
            f"bf16 linear {n} x {n}",
            tokens,
            size_of(stored[0], x) + 2 * tokens * n,
            2 * tokens * n * n,
            ran("linear", x, stored[0]),
            rotating(partial(torch.ops.dsv4.linear, x), stored),
            _linears(x, weights, "torch {}"),
        )


def output_projection(of: Dimensions) -> Iterator[Work]:
    """wo_a of bf16, and as checkpoints store it: a group of heads times its rows."""
    width = of.heads * of.head_dim // of.groups
    shape = of.groups, of.rank, width
    codes = cold(lambda: fp8_weight(*shape), math.prod(shape))
    wide = [torch.stack([dequantize_fp8(*g) for g in zip(*w, strict=True)]) for w in codes]
    floats = {"bf16": [w.bfloat16() for w in wide], "fp32": wide[: copies(4 * math.prod(shape))]}
    op = torch.ops.dsv4.grouped_output_projection
    grouped = torch.ops.dsv4.fp8_grouped_gemm
    for tokens in of.many:
        o = bf16(tokens, of.heads, of.head_dim)
        rows = o.view(tokens, of.groups, width).transpose(0, 1).flatten(0, 1).float()
        by_group = [
            (name, rows.view(of.groups, tokens, width).to(_FLOATS[name]), some)
            for name, some in floats.items()
        ]
        ends = torch.arange(of.groups + 1, dtype=torch.int32) * tokens
        flops = 2 * tokens * math.prod(shape)
        out = tokens * of.groups * of.rank
        sizes = f"{of.groups} groups of {of.rank} x {width}"
        yield Work(
            "grouped_output_projection",
            f"output projection, bf16, {sizes}",
            tokens,
            size_of(floats["bf16"][0], o) + 2 * out,
            flops,
            ran("grouped_output_projection", o, floats["bf16"][0]),
            rotating(partial(op, o), floats["bf16"]),
            {
                f"torch {name} bmm": rotating(lambda w, x=x: _joined(x @ w.mT), some)
                for name, x, some in by_group
            },
        )
        yield Work(
            "fp8_grouped_gemm",
            f"output projection, FP8, {sizes}",
            tokens,
            size_of(*codes[0], rows) + 4 * out,
            flops,
            ran("fp8_grouped_gemm", rows, None, *codes[0], ends),
            rotating(lambda w, x=rows, e=ends: grouped(x, None, *w, e), codes),
            {
                f"dequantised before, torch {name} bmm": rotating(
                    lambda w, x=x: (x @ w.mT).flatten(0, 1), some
                )
                for name, x, some in by_group
            },
        )


def _joined(y: torch.Tensor) -> torch.Tensor:
    """[G, T, R] -> [T, G*R]."""
    return y.transpose(0, 1).flatten(1)
