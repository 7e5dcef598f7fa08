"""`dsv4-ascend bench`: measure this machine; ratios within one run are what counts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dsv4_ascend.bench import machine
from dsv4_ascend.bench.against import ENGINES
from dsv4_ascend.bench.against import named as against_named
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.launches import launches
from dsv4_ascend.bench.page import page
from dsv4_ascend.bench.peer import PeerError
from dsv4_ascend.bench.plots import Plot, draw
from dsv4_ascend.bench.sections import Section
from dsv4_ascend.bench.suites import NAMED, PLOTTED, SUITES, Found, Options
from dsv4_ascend.cli import console, print_json
from dsv4_backend.support import queue_mode

DEVICES = ("cpu", "npu")
Engine = tuple[str, Path] | None
_FLASH = Dimensions()
_MOST_EXPERTS = 256
_SUITE = f"One of {', '.join(SUITES)}; several if given again."
_WRITE = "Write a page with machine, versions and all results: docs/performance.md is one."
_AGAINST = f"Suite ops: torch, or {', '.join(ENGINES)} in an environment of its own."
_PEER = "The Python of that environment, as .venv/vllm/bin/python of ci/serve --install."
_PLOT = f"Folder for pictures as SVG, of suites {', '.join(PLOTTED)}; takes the extra `plot`."
_EXPERTS = typer.Option(
    help="Suites ops and layer: routed experts, as memory allows; 256 in Flash.",
    min=_FLASH.chosen,
    max=_MOST_EXPERTS,
    show_default=str(_FLASH.experts),
)


def bench(
    suite: Annotated[list[str] | None, typer.Option(help=_SUITE, show_default="host")] = None,
    pattern: Annotated[str, typer.Option("-k", help="Part of an operator's name.")] = "",
    rounds: Annotated[int, typer.Option(help="Samples of every call, interleaved.", min=2)] = 15,
    experts: Annotated[int | None, _EXPERTS] = None,
    device: Annotated[
        str, typer.Option(help="cpu, or npu: launches beside torch_npu's own (suite host).")
    ] = "cpu",
    against: Annotated[str, typer.Option(help=_AGAINST)] = "torch",
    peer_python: Annotated[Path | None, typer.Option(help=_PEER)] = None,
    write: Annotated[Path | None, typer.Option(help=_WRITE, dir_okay=False)] = None,
    plot: Annotated[Path | None, typer.Option(help=_PLOT, file_okay=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time operators on this machine: medians with quartiles,
    and the ratio to torch's own in the same run.

    host: what a call costs on the smallest arguments, checks and dispatch and all.
    ops: operators at Flash's sizes, weights cold, beside the best of torch alone, or of an engine
    in an environment of its own (--against).
    decode: tokens per second of the shipped small model; prefill: of its prompts.
    long-context: attention of a layer from 1k to 1M tokens, and its memory.
    layer: a layer of each kind at Flash's sizes: a token behind 1k to 1M, a prompt of 2,048.
    transformers: its eager attention beside `integrations.transformers.sparse()`, 1k to 16k tokens.
    OMP_NUM_THREADS decides the threads.
    """
    chosen = suite or ["host"]
    for name in chosen:
        _check_choice(name, tuple(SUITES), "--suite")
    _check_choice(device, DEVICES, "--device")
    engine = _engine(against, peer_python, chosen)
    if device == "npu":
        _only_host(chosen, experts, {"--write": write, "--plot": plot})
        _bench_launches(pattern, rounds, json)
        return
    _check_pattern(pattern, chosen, engine)
    dimensions = _dimensions(experts, chosen, engine)
    _check_page(write)
    _check_plot(plot, chosen)
    facts = machine.facts() | machine.versions()
    run: dict[str, Any] = {"suites": ", ".join(dict.fromkeys(chosen)), "rounds": rounds, **_now()}
    run |= {"pattern": pattern} if pattern else {}
    run |= {"against": against} if engine else {}
    options = Options(pattern, rounds, dimensions, engine)
    found = {name: _run(name, options, json) for name in dict.fromkeys(chosen)}
    run["load after"] = round(machine.load(), 1)
    if json:
        print_json({**run, **facts, "suites": {name: one.data for name, one in found.items()}})
    else:
        every = ", ".join(f"{name} {value}" for name, value in (facts | run).items())
        console().print(escape(every), soft_wrap=True)
    if write is not None:
        sections = [section for one in found.values() for section in one.sections]
        write.write_text(page(sections, run, facts), encoding="utf-8")
    if plot is not None:
        _draw(list(chain.from_iterable(one.plots for one in found.values())), plot)


def _draw(pictures: Sequence[Plot], folder: Path) -> None:
    for picture in pictures:
        draw(picture, folder)
    if not pictures:
        console(stderr=True).print("no picture: nothing that was measured has one")


def _now() -> dict[str, object]:
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "load before": round(machine.load(), 1)}


def _run(name: str, options: Options, quiet: bool) -> Found:
    try:
        found = SUITES[name](options)
    except PeerError as error:
        raise typer.BadParameter(str(error), param_hint="--peer-python") from error
    if not quiet:
        for section in found.sections:
            _show(section)
    return found


def _show(section: Section) -> None:
    out = console()
    if section.rows:
        table = Table(*section.columns, title=section.title, title_justify="left")
        for i, column in enumerate(table.columns):
            column.justify = "left" if i in section.text else "right"
        for row in section.rows:
            table.add_row(*map(escape, row))
        out.print(table)
    for note in section.notes:
        out.print(escape(f"- {note}"), soft_wrap=True)


def _check_choice(found: str, choices: Sequence[str], option: str) -> None:
    if found not in choices:
        raise typer.BadParameter(f"{found!r} is not one of {', '.join(choices)}", param_hint=option)


def _engine(against: str, python: Path | None, suites: Sequence[str]) -> Engine:
    """What suite ops is compared with, None for torch."""
    _check_choice(against, ("torch", *ENGINES), "--against")
    if against == "torch":
        if python is not None:
            raise typer.BadParameter("torch runs in this Python", param_hint="--peer-python")
        return None
    if set(suites) != {"ops"}:
        raise typer.BadParameter("only suite ops has other engines", param_hint="--against")
    if python is None:
        raise typer.BadParameter(f"{against} needs --peer-python", param_hint="--against")
    return against, python


def _check_pattern(pattern: str, suites: Iterable[str], engine: Engine) -> None:
    if not pattern:
        return
    for name in suites:
        if name not in NAMED:
            raise typer.BadParameter(f"suite {name} runs no single operators", param_hint="-k")
        named = NAMED[name] if engine is None else against_named
        if not named(pattern):
            raise typer.BadParameter(
                f"{pattern!r} is part of no name of suite {name}: {', '.join(named(''))}",
                param_hint="-k",
            )


def _dimensions(experts: int | None, suites: Sequence[str], engine: Engine) -> Dimensions:
    if experts is None:
        return _FLASH
    if not {"ops", "layer"} & set(suites):
        raise typer.BadParameter("only suites ops and layer have experts", param_hint="--experts")
    dimensions, free = replace(_FLASH, experts=experts), machine.memory("MemAvailable")
    needed = dimensions.beside_bytes if engine else dimensions.suite_bytes
    if free and needed > free:
        others = f"{engine[0]}'s" if engine else "torch's widened ones"
        raise typer.BadParameter(
            f"with {experts} experts, and {others} beside them, the suite takes"
            f" {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            param_hint="--experts",
        )
    return dimensions


def _check_page(write: Path | None) -> None:
    """Before minutes of work, whether the page can be written."""
    if write is None:
        return
    if not write.parent.is_dir():
        raise typer.BadParameter(f"{write.parent} is no folder", param_hint="--write")
    if not os.access(write if write.exists() else write.parent, os.W_OK):
        raise typer.BadParameter(f"{write} cannot be written", param_hint="--write")


def _check_plot(folder: Path | None, suites: Sequence[str]) -> None:
    """Before minutes of work, whether there will be pictures."""
    if folder is None:
        return
    if not set(PLOTTED) & set(suites):
        raise typer.BadParameter(
            f"only suites {', '.join(PLOTTED)} have pictures", param_hint="--plot"
        )
    if find_spec("matplotlib") is None:
        raise typer.BadParameter(
            "matplotlib is missing: pip install 'dsv4-ascend[plot]'", param_hint="--plot"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: {error.strerror}", param_hint="--plot") from error
    if not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{folder} cannot be written", param_hint="--plot")


def _only_host(
    suites: Sequence[str], experts: int | None, files: Mapping[str, Path | None]
) -> None:
    if set(suites) != {"host"}:
        raise typer.BadParameter("on npu there is only suite host", param_hint="--suite")
    if experts is not None:
        raise typer.BadParameter("only suites on cpu have experts", param_hint="--experts")
    for option, file in files.items():
        if file is not None:
            raise typer.BadParameter("pages and pictures are about cpu", param_hint=option)


def _bench_launches(pattern: str, rounds: int, json: bool) -> None:
    rows = launches(pattern, rounds)
    if not rows:
        timed = ", ".join(launch.operator for launch in launches("", 2))
        raise typer.BadParameter(
            f"{pattern!r} is part of no name of what is timed on npu: {timed}", param_hint="-k"
        )
    mode = {"TASK_QUEUE_ENABLE": queue_mode()}
    if json:
        print_json({"suite": "host", "rounds": rounds, **mode, "calls": [asdict(r) for r in rows]})
        return
    table = Table("operator", "function", "arguments", "us", "torch_npu us", "times torch_npu")
    for column in range(2, 6):
        table.columns[column].justify = "right"
    for row in rows:
        times = f"{1e6 * row.ours.median:.1f}", f"{1e6 * row.theirs.median:.1f}"
        table.add_row(row.operator, row.function, str(row.arguments), *times, f"{row.ratio:.2f}")
    console().print(table)
    console().print(
        f"what the caller waits for; TASK_QUEUE_ENABLE {queue_mode()}; {rounds} interleaved samples"
    )
