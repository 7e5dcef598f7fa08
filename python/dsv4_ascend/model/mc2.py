"""Dispatch and combine of an NPU: rows go to the ranks of their experts and come back summed, with
the shared expert, in two functions of CANN (MC2, spec/ascend-operators.md 5.1).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import distributed

from dsv4_ascend.model.sharding import DeviceLayout
from dsv4_backend.errors import EnvironmentFault

_MOST_ROWS, _MOST_CHOICES, _MOST_EXPERTS = 512, 16, 1024
_WIDTHS = range(1024, 8193)
_DEFAULT_BUFFER = 200
"""MB of HCCL_BUFFSIZE where it is not set."""


def _aligned(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Zeros behind the rows of x."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _buffer() -> int:
    """Bytes of a communicator's buffer."""
    text = os.environ.get("HCCL_BUFFSIZE") or str(_DEFAULT_BUFFER)
    if not (text.isascii() and text.isdigit()):
        raise EnvironmentFault(f"HCCL_BUFFSIZE: found {text!r:.40}, expected a number of MB")
    return int(text) << 20


class Mc2:
    """A communicator of hccl for these two functions alone: the documents want no other in it.

    rows: the most rows that any of its ranks has, which ranks agree on before each run.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.rows = 0

    def takes(self, x: torch.Tensor, choices: int, experts: int) -> bool:
        """Whether the documents allow rows [T, d] of this kind, `choices` of so many experts each:
        the same answer on all ranks, which have other T.
        """
        d, local = x.shape[1], experts // self.size
        window = local * self.size * _aligned(_aligned(2 * d, 32) + 64, 512)
        needed = 2 * self.rows * (window + choices * _aligned(2 * d, 512))
        return (
            x.dtype in (torch.bfloat16, torch.float16)
            and d in _WIDTHS
            and choices <= _MOST_CHOICES
            and experts <= _MOST_EXPERTS
            and 0 < self.rows <= _MOST_ROWS
            and needed <= _buffer()
        )

    def layer(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        local: int,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        shared: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What the experts of all ranks and the shared one give x [T, d], T up to `rows`: [T, d].

        weights fp32 [T, k] multiply after the experts; ids int32 [T, k]; local: experts of a rank.
        compute(rows [M, d], counts int64 [local]) -> [M, d]: this rank's experts, rows by expert.
        """
        tokens = len(x)
        x, weights, ids = (_filled(t, self.rows) for t in (x, weights, ids))
        domain = self.name, self.size, self.rank, local * self.size
        mask = torch.arange(self.rows, device=x.device) < tokens
        alike = {"x_active_mask": mask, "shared_expert_num": 0}
        arrived, _, places, counts, received, *_ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
            x, ids, *domain, **alike
        )
        own = int(counts.sum())
        y = torch.empty_like(arrived)  # nothing behind the own rows is read
        y[:own] = compute(arrived[:own], counts)
        result: torch.Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
            y, ids, places, received, weights, *domain, shared_expert_x=shared(x), **alike
        )
        return result[:tokens]


def mc2_of(layout: DeviceLayout, rank: int) -> Mc2 | None:
    """Of this rank, made by all ranks on NPUs together; None where no rows travel, and on A2, whose
    combine has no shared expert and so another rounding.
    """
    name = torch.npu.get_device_name()  # type: ignore[attr-defined]
    if not layout.moves_tokens or name.startswith("Ascend910B"):
        return None
    runs = [range(first, first + layout.ep) for first in range(0, layout.world, layout.ep)]
    groups = [distributed.new_group(list(peers)) for peers in runs]  # all make all, in one order
    place = rank // layout.ep
    number = rank - runs[place].start
    backend = groups[place]._get_backend(torch.device("npu"))
    return Mc2(backend.get_hccl_comm_name(number), number, layout.ep)
