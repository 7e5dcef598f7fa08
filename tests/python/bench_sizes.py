"""Suites of `dsv4-ascend bench` at sizes that take no time."""

from functools import partial

import typer
from typer.testing import CliRunner

from dsv4_ascend.bench import decode, long_context, suites, work
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.machine import LimitProbe
from dsv4_ascend.cli.bench import bench

TINY = Dimensions(
    hidden=256,
    intermediate=128,
    experts=4,
    chosen=2,
    heads=4,
    head_dim=128,
    groups=2,
    rank=32,
    window=8,
    selected=16,
    index_heads=4,
    index_dim=32,
    index_keys=200,
    context=1024,
    hca_ratio=32,
    chunk=16,
    block=16,
    many=(1, 5),
    few=(1, 5),
    rows=(1, 5),
)
SHORT = decode.Lengths(prompts=(8, 16), context=4, steps=2)
CACHE = 16 << 10


def shrink(monkeypatch):
    """Caches of 16 KiB, so that few sets take turns, and no long reads."""
    monkeypatch.setattr(work, "last_level_cache", lambda: CACHE)
    monkeypatch.setattr(work, "LimitProbe", lambda: LimitProbe(side=16, read=1 << 12))


def shrink_suites(monkeypatch):
    """That, and all suites of the command tiny."""
    shrink(monkeypatch)
    monkeypatch.setattr("dsv4_ascend.cli.bench._FLASH", TINY)
    few = {
        (suites.decode, "decode"): partial(decode.decode, of=SHORT),
        (suites.decode, "prefill"): partial(decode.prefill, of=SHORT),
        (suites.long_context, "long_context"): partial(
            long_context.long_context, of=TINY, contexts=(64, 128)
        ),
    }
    for (module, name), suite in few.items():
        monkeypatch.setattr(module, name, suite)


def run(*arguments):
    """The command."""
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, list(arguments))
