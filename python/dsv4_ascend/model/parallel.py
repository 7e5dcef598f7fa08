"""Groups of ranks and what they do together; with one device nothing is done.

The network asks a `Parallel` for the group of each task. A `Group` is one of torch.distributed
(gloo on a CPU, hccl on an NPU), or of one rank. An engine's group is another class with these four
members. Ranks of a group must call the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import distributed

from dsv4_ascend.model.mc2 import Mc2
from dsv4_ascend.model.sharding import DeviceLayout
from dsv4_backend.errors import EnvironmentFault

_T = TypeVar("_T")


class PeerFault(EnvironmentFault):
    """Ranks could not do something together: one of them has ended, or its network has."""


class Group(Protocol):
    """Ranks that divide a task: this one is number `rank` of `size`."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's float x, added in fp32, rounded once to x's dtype.

        The same bits on every rank, or ranks would choose other experts for a token.
        """

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Every rank's x, of equal shapes, behind each other along a dimension."""

    def all_to_all(
        self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """Rows from every rank for this one, in order of ranks.

        x [sum(sent), ...]: rows for each rank in turn. received: rows that come from each.
        """


class OneRank:
    """A group of this rank alone: everything is as it was."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group`."""
        return x

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """See `Group`."""
        return x

    def all_to_all(
        self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """See `Group`."""
        return x


class TorchGroup:
    """A process group of torch.distributed. PeerFault names the peers of what failed."""

    def __init__(self, group: distributed.ProcessGroup, peers: Sequence[int]) -> None:
        self.rank, self.size = peers.index(distributed.get_rank()), len(peers)
        self._group, self._peers = group, tuple(peers)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group`."""
        total = x.float() if x.dtype != torch.float32 else x.clone()
        self._together("all_reduce", lambda: distributed.all_reduce(total, group=self._group))
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """See `Group`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in self._peers]
        self._together("all_gather", lambda: distributed.all_gather(parts, x, group=self._group))
        return torch.cat(parts, dim)

    def all_to_all(
        self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """See `Group`."""
        result = x.new_empty(sum(received), *x.shape[1:])

        def exchange() -> None:
            distributed.all_to_all_single(
                result, x.contiguous(), list(received), list(sent), group=self._group
            )

        self._together("all_to_all", exchange)
        return result

    def _together(self, what: str, act: Callable[[], _T]) -> _T:
        try:
            return act()
        except RuntimeError as error:
            peers = ", ".join(str(p) for p in self._peers if p != distributed.get_rank())
            raise PeerFault(
                f"{what} with ranks {peers}: {(str(error).splitlines() or ['failed'])[0]}"
            ) from error


@dataclass(frozen=True)
class Parallel:
    """What a rank does, and with whom.

    tensor: ranks that divide attention and vocabulary. same_tokens: those of its data group.
    experts: those that divide the experts. data: one rank of every data group, this one of its own.
    mc2: how an NPU moves rows between `experts`; None: by all-to-all.
    """

    layout: DeviceLayout = field(default_factory=DeviceLayout)
    rank: int = 0
    tensor: Group = field(default_factory=OneRank)
    same_tokens: Group = field(default_factory=OneRank)
    experts: Group = field(default_factory=OneRank)
    data: Group = field(default_factory=OneRank)
    mc2: Mc2 | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


ALONE = Parallel()
"""One device."""


def parallel_of(layout: DeviceLayout, rank: int) -> Parallel:
    """The groups of this rank, made by all ranks of torch.distributed's default group together."""
    world = layout.world

    def runs(size: int) -> list[list[int]]:
        return [list(range(first, first + size)) for first in range(0, world, size)]

    strides = [list(range(first, world, layout.width)) for first in range(layout.width)]
    made: dict[tuple[int, ...], distributed.ProcessGroup] = {}

    def group(divided: list[list[int]]) -> Group:
        for peers in divided:  # also those of other ranks: all make all groups in one order
            if len(peers) > 1 and tuple(peers) not in made:
                everyone = distributed.group.WORLD if len(peers) == world else None
                made[tuple(peers)] = everyone or distributed.new_group(peers)
        own = next(peers for peers in divided if rank in peers)
        return TorchGroup(made[tuple(own)], own) if len(own) > 1 else OneRank()

    return Parallel(
        layout,
        rank,
        tensor=group(runs(layout.tp)),
        same_tokens=group(runs(layout.width)),
        experts=group(runs(layout.ep)),
        data=group(strides),
    )
