"""The ranks that a launcher started (torchrun, or anything that sets its variables), connected."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dsv4_ascend.model.mc2 import mc2_of
from dsv4_ascend.model.parallel import ALONE, Parallel, parallel_of
from dsv4_ascend.model.sharding import DeviceLayout
from dsv4_ascend.model.watch import MEETING, watching
from dsv4_backend.errors import ArgumentError, EnvironmentFault

_NUMBERS = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_VARIABLES = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")
_MEETINGS = itertools.count()
"""Numbers of the default groups that this process was in: each has its own part of the store."""


def ranks_started(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher started, this one among them; 1 without a launcher.

    EnvironmentFault for variables that are missing or no numbers.
    """
    if environ.get("WORLD_SIZE") == "1" or not environ.keys() & {"RANK", "WORLD_SIZE"}:
        return 1
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if missing:
        raise EnvironmentFault(
            f"{', '.join(missing)}: not set while RANK or WORLD_SIZE is; start with "
            "torchrun --nproc-per-node N -m dsv4_ascend ..., or set all of " + ", ".join(_VARIABLES)
        )
    for name in _NUMBERS:
        if re.fullmatch(r"\d{1,6}", environ[name], re.ASCII) is None:
            raise EnvironmentFault(f"{name}: found {environ[name]!r:.40}, expected a number")
    world, rank = int(environ["WORLD_SIZE"]), int(environ["RANK"])
    if rank >= world:
        raise EnvironmentFault(f"RANK: found {rank}, expected less than WORLD_SIZE {world}")
    return world


def layout_of(
    world: int, tp: int | None = None, ep: int | None = None, dp: int | None = None
) -> DeviceLayout:
    """The layout of so many ranks: what is not given divides as much as it can.

    Without any, all ranks are one tensor group; with dp, those of a data group are one; with tp
    alone, every tensor group is a data group. Experts are divided among all. ArgumentError for
    counts that do not fit the ranks, with those that do.
    """
    if world == 1 and max(tp or 1, ep or 1, dp or 1) > 1:
        name, count = next((n, c) for n, c in (("tp", tp), ("ep", ep), ("dp", dp)) if (c or 1) > 1)
        wanted = max(ep or 1, (tp or 1) * (dp or 1))
        raise ArgumentError(
            f"--{name}: found {count} and one process, expected {wanted} of them: "
            f"torchrun --nproc-per-node {wanted} -m dsv4_ascend ..."
        )
    if dp is None:
        dp = world // tp if tp and world % tp == 0 and ep is None else 1
    if tp is None:
        tp = world // dp if dp > 0 and world % dp == 0 else world
    return DeviceLayout(world, tp, world if ep is None else ep, dp)


def local_device(device: str, environ: Mapping[str, str] = os.environ) -> str:
    """The device of this process: of NPUs without a number, the one of its rank on this host."""
    several = device == "npu" and ranks_started(environ) > 1
    return f"npu:{int(environ['LOCAL_RANK'])}" if several else device


def _meet(backend: str) -> None:
    """Make the default group. Ranks that do not come are waited for as long as `MEETING` says, not
    as long as exchanges may take: loading a release, for one.
    """
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))
    distributed.init_process_group(
        backend, store=PrefixStore(f"dsv4/{next(_MEETINGS)}", store), rank=rank, world_size=world
    )


@contextmanager
def connected(
    device: torch.device | str = "cpu",
    *,
    tp: int | None = None,
    ep: int | None = None,
    dp: int | None = None,
) -> Iterator[Parallel]:
    """The rank of this process among all that were started, for `load(parallel=...)`; `ALONE` if it
    is the only one.

    Every rank enters it; options as in `layout_of`. Until it is left, the end of another rank ends
    this process with exit code 3 and a line that names that rank: it could hang in an exchange
    otherwise. EnvironmentFault if the ranks do not find each other.
    """
    world = ranks_started()
    layout = layout_of(world, tp, ep, dp)
    if world == 1:
        yield ALONE
        return
    npu = torch.device(device).type == "npu"
    if npu:
        torch.npu.set_device(device)  # type: ignore[attr-defined]
    try:
        _meet("hccl" if npu else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EnvironmentFault(
            f"the {world} ranks do not find each other at {where} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}"
        ) from error
    try:
        rank = distributed.get_rank()
        with watching(rank, world):
            parallel = parallel_of(layout, rank)
            yield replace(parallel, mc2=mc2_of(layout, rank)) if npu else parallel
    finally:
        distributed.destroy_process_group()
