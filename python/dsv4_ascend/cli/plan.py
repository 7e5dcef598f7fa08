"""`dsv4-ascend plan`: does it fit, where does the time go, which layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4_ascend.cli import FINDINGS, print_json
from dsv4_ascend.cli.outputs import check_output
from dsv4_ascend.cli.plan_tables import show, show_explained
from dsv4_ascend.plan.as_json import as_json
from dsv4_ascend.plan.explain import sources
from dsv4_ascend.plan.formats import CACHES, PRECISIONS
from dsv4_ascend.plan.page import page
from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.planner import plan as answer
from dsv4_ascend.plan.question import MOST_DRAFTS, Options, ask
from dsv4_ascend.plan.tables import DEVICES

_DEVICE = f"One of {', '.join(DEVICES['devices'])}; of a 910C one die."
_MEMORY = "Memory of a device in GB, where it is sold with several; the smallest if absent."
_SET = "A device's or an efficiency's number, or KEY=2x; --explain lists them. Repeatable."


def plan(
    model: Annotated[str, typer.Option(help="flash, pro, or a folder with a config.json.")],
    device: Annotated[str, typer.Option(help=_DEVICE)],
    count: Annotated[int, typer.Option(help="Devices.")],
    context: Annotated[int, typer.Option(help="Tokens of a request, prompt and answer.")],
    batch: Annotated[
        int | None,
        typer.Option(help="Requests in flight on all devices.", show_default="one per device"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRECISIONS)}.", show_default="what the device runs"),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="tp=..,dp=..,ep=.. instead of the fastest.", show_default="search"),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(help=f"Drafts of the MTP block, 0 to {MOST_DRAFTS}.", show_default="1"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help=f"Cache format: {', '.join(CACHES)}.", show_default="the device's"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Entries of a cache page: 128, 64, 32.")] = 128,
    memory: Annotated[float | None, typer.Option(help=_MEMORY, metavar="GB")] = None,
    graph: Annotated[bool, typer.Option(help="Decode steps are captured graphs.")] = True,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help=_SET, metavar="KEY=VALUE")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts, one file.", dir_okay=False)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every number with its rule and source.")
    ] = False,
) -> None:
    """Whether a model fits on devices, the best layouts, and where the time of a step goes.

    Times are operator time: estimates of kernels, exchanges and launches, not of a served engine.
    The exit code is 1 when it does not fit.
    """
    if html is not None:
        check_output(html, "--html")
    options = Options(
        model=model, device=device, count=count, context=context, batch=batch,
        precision=precision, layout=layout, draft_tokens=draft_tokens, cache=cache,
        block_size=block_size, memory=memory, graph=graph, changes=changes or (),
    )  # fmt: skip
    found = answer(ask(options))
    if html is not None:
        html.write_text(page(found), encoding="utf-8")
    _tell(found, json, explain)
    if not found.fits:
        raise typer.Exit(FINDINGS)


def _tell(found: Plan, json: bool, explain: bool) -> None:
    if json:
        print_json(as_json(found) | ({"explain": sources(found)} if explain else {}))
    elif explain:
        show_explained(found)
    else:
        show(found)
