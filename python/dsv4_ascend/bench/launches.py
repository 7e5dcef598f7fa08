"""Suite `host` on an NPU: what a launch costs the host, beside torch_npu's own operator that
launches the same function on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv4_ascend.bench.timing import Timing, interleaved
from dsv4_backend.errors import EnvironmentFault
from dsv4_backend.support import npu_fault


@dataclass(frozen=True)
class Launch:
    """One row. ratio: of medians, ours over torch_npu's, in the same run."""

    operator: str
    function: str
    arguments: int
    ours: Timing
    theirs: Timing
    ratio: float


class _Pair(NamedTuple):
    """An operator of ours and of torch_npu, both of which launch `function` once."""

    function: str
    arguments: int
    ours: Callable[[], object]
    theirs: Callable[[], object]


def launches(pattern: str, rounds: int) -> list[Launch]:
    """Pairs whose operators' names contain `pattern`. EnvironmentFault where no NPU can be used."""
    fault = npu_fault()
    if fault is not None:
        raise EnvironmentFault(f"npu: {fault}")
    with torch.inference_mode():
        pairs = {name: pair for name, pair in _pairs().items() if pattern in name}
        calls = {(n, who): getattr(p, who) for n, p in pairs.items() for who in ("ours", "theirs")}
        # Between blocks the device catches up: what is timed is what the caller waits for.
        wait: Callable[[], object] = torch.npu.synchronize  # type: ignore[attr-defined]
        timings = interleaved(calls, rounds, wait)
    return [_row(name, pair, timings) for name, pair in pairs.items()]


def _row(name: str, pair: _Pair, timings: Mapping[tuple[str, str], Timing]) -> Launch:
    ours, theirs = timings[name, "ours"], timings[name, "theirs"]
    return Launch(name, pair.function, pair.arguments, ours, theirs, ours.median / theirs.median)


def _pairs() -> dict[str, _Pair]:
    """Smallest tensors that the functions take."""
    import torch_npu

    ops = torch.ops.dsv4
    x = torch.randn(1, 64).bfloat16().to("npu")
    weight, wide = torch.ones(64).bfloat16().to("npu"), torch.randn(2, 64, 64).bfloat16().to("npu")
    codes, scale = ops.int8_token_quant(x)
    matrix = torch.ones(64, 64, dtype=torch.int8).to("npu")
    columns, turned = torch.ones(64).to("npu"), matrix.T
    ends = torch.tensor([0, 1, 1], dtype=torch.int32).to("npu")
    counts, stacks = torch.tensor([1, 1]).to("npu"), wide.transpose(1, 2)
    return {
        "rms_norm": _Pair(
            "aclnnRmsNorm",
            3,
            lambda: ops.rms_norm(x, weight, 1e-6),
            lambda: torch_npu.npu_rms_norm(x, weight, 1e-6),
        ),
        "int8_token_quant": _Pair(
            "aclnnDynamicQuantV2",
            1,
            lambda: ops.int8_token_quant(x),
            lambda: torch_npu.npu_dynamic_quant(x),
        ),
        "int8_gemm": _Pair(
            "aclnnQuantMatmulV5",
            4,
            lambda: ops.int8_gemm(codes, scale, matrix, columns),
            lambda: torch_npu.npu_quant_matmul(
                codes, turned, columns, pertoken_scale=scale, output_dtype=torch.bfloat16
            ),
        ),
        "grouped_gemm": _Pair(
            "aclnnGroupedMatmulV5, with a cast of its offsets",
            3,
            lambda: ops.grouped_gemm(x, wide, ends),
            lambda: torch_npu.npu_grouped_matmul(
                [x], [stacks], group_list=counts, split_item=3, group_type=0, group_list_type=0
            ),
        ),
    }
