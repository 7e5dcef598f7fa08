"""Options of commands that run on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dsv4_ascend.model.model import usable_device
from dsv4_ascend.model.parallel import Parallel
from dsv4_ascend.model.ranks import connected, local_device

_PANEL = "Several devices (torchrun --nproc-per-node N -m dsv4_ascend ...)"
TensorRanks = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        rich_help_panel=_PANEL,
        help="Ranks that divide attention and vocabulary: all of a data group if absent.",
    ),
]
ExpertRanks = Annotated[
    int | None,
    typer.Option(
        "--ep",
        min=1,
        rich_help_panel=_PANEL,
        help="Ranks that divide the routed experts: all if absent.",
    ),
]
DataRanks = Annotated[
    int | None,
    typer.Option(
        "--dp",
        min=1,
        rich_help_panel=_PANEL,
        help="Groups of ranks with prompts of their own: one if absent, unless --tp is given.",
    ),
]


@contextmanager
def on_ranks(
    device: str, tp: int | None, ep: int | None, dp: int | None
) -> Iterator[tuple[Parallel, str]]:
    """The rank among those that were started, and its device. See `connected`."""
    own = local_device(device)
    usable_device(own, "--device")
    with connected(own, tp=tp, ep=ep, dp=dp) as parallel:
        yield parallel, own
