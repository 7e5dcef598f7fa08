"""Suite `ops`: operators at Flash dimensions beside the best that torch alone does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dsv4_ascend.bench import contexts, int8_products, products, row_operators, work
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.machine import SIDE, LimitProbe, Limits
from dsv4_ascend.bench.sections import Section, quartiles, rate, seconds
from dsv4_ascend.bench.work import Row, Work, measure

BUILDERS: dict[str, Callable[[Dimensions], Iterator[Work]]] = {
    "fp4_grouped_gemm": products.experts,
    "fp8_gemm": products.fp8_linear,
    "int8_gemm": int8_products.linear,
    "int8_grouped_gemm": int8_products.experts,
    "linear": products.bf16_linear,
    "grouped_output_projection": products.output_projection,
    "sparse_attention": contexts.sparse_attention,
    "sparse_attention, dense": contexts.dense_attention,
    "indexer_topk": contexts.indexer,
    "topk_indices": contexts.topk,
    "hc_pre": row_operators.hc_pre,
    "hc_post": row_operators.hc_post,
    "act_quant": row_operators.act_quant,
    "rms_norm": row_operators.rms_norm,
    "rope": row_operators.rope,
    "compress_pool": row_operators.compressor,
}
"""Operator that is measured -> what makes its work."""
TIE = 1.1
"""Ratios below it, and above its inverse, are ties: so much differs from run to run."""


@dataclass(frozen=True)
class Ops:
    """What the suite found: limits of the machine in the same run, and rows."""

    limits: Limits
    rows: list[Row]


def named(pattern: str) -> list[str]:
    """What is measured whose name contains `pattern`."""
    return [name for name in BUILDERS if pattern in name]


def ops(pattern: str, rounds: int, of: Dimensions, probe: LimitProbe | None = None) -> Ops:
    """Time what `named` lists, all in one interleaved run."""
    torch.manual_seed(0)
    with torch.inference_mode():
        works = [made for name in named(pattern) for made in BUILDERS[name](of)]
        return Ops(*measure(works, rounds, probe))


def section(found: Ops, peer: str = "torch") -> Section:
    """The table."""
    limits = found.limits
    return Section(
        "Operators at Flash dimensions",
        (
            "work",
            "T",
            "ran",
            "time",
            "quartiles",
            "GB/s",
            "GFLOP/s",
            "of limit",
            f"{peer}'s best",
            f"{peer} time",
            f"{peer} / ours",
        ),
        [_cells(row) for row in found.rows],
        (
            "limits as torch reaches them in the same run:"
            f" it reads {rate(limits.bytes_per_second)} GB/s (sum of more than the caches hold)"
            f" and computes {rate(limits.flops_per_second)} GFLOP/s"
            f" (fp32 matmul of {SIDE} x {SIDE}); kernels that do better pass 100 %",
            "of limit: the larger of bytes / read rate and operations / fp32 rate, over the time;"
            " bytes and operations are counted, weights and caches once, as they are stored",
            f"{peer} / ours: the time of {peer}'s fastest formulation over ours, above 1 where ours"
            f" is faster; formulations that take {work.HOPELESS:g} times the fastest one's time in"
            " a trial are left out (JSON has them)",
            "weights, caches and chosen rows are cold: sets larger than the last-level cache take"
            " turns; activations and windows are warm",
        ),
        text=(0, 2, 8),
    )


def _cells(row: Row) -> list[str]:
    return [
        row.what,
        str(row.tokens),
        row.ran,
        seconds(row.ours.median),
        quartiles(row.ours),
        rate(row.bytes_per_second),
        rate(row.flops_per_second) if row.flops else "-",
        f"{100 * row.of_limit:.0f} %",
        row.peer,
        seconds(row.peer_timing.median),
        f"{row.ratio:.2f}",
    ]


def verdicts(found: Ops, peer: str = "torch") -> Section:
    """How often ours is faster, as fast and slower, and each case in which it is not faster."""
    wins = [row for row in found.rows if row.ratio >= TIE]
    losses = [row for row in found.rows if row.ratio <= 1 / TIE]
    ties = [row for row in found.rows if row not in wins and row not in losses]
    listed = [("loss", row) for row in losses] + [("tie", row) for row in ties]
    return Section(
        "Wins and losses",
        ("", "work", "T", f"{peer}'s best", f"{peer} / ours"),
        [
            [verdict, row.what, str(row.tokens), row.peer, f"{row.ratio:.2f}"]
            for verdict, row in listed
        ],
        (
            f"{len(wins)} wins, {len(ties)} ties (within {TIE}), {len(losses)} losses against"
            f" {peer}'s fastest formulation; the table lists losses and ties",
        ),
        text=(0, 1, 3),
    )
