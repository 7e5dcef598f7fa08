"""`dsv4-ascend convert`: a checkpoint in the formats of a chip."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dsv4_ascend.cli import console
from dsv4_ascend.cli.loading import AllowUnknown, chosen_folder
from dsv4_ascend.cli.progress import bytes_bar
from dsv4_ascend.convert import job
from dsv4_ascend.convert.folders import QUALITY
from dsv4_ascend.convert.quality import TOKENS, Quality
from dsv4_ascend.convert.quality import quality as measure
from dsv4_ascend.convert.targets import TARGETS, target_named
from dsv4_ascend.model.profile import PROFILES

_SOURCE = "Official folder, or a bf16 copy of one; `tiny` is the shipped small model."


def convert(
    source: Annotated[Path, typer.Argument(help=_SOURCE)],
    folder: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder, or one to finish.")],
    target: Annotated[str, typer.Option(help=f"{', '.join(TARGETS)}.")],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality", help=f"Then errors of weights and perplexities, saved as {QUALITY}."
        ),
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=0, help="Of the perplexities; 0 for none.", metavar="COUNT")
    ] = TOKENS,
    allow_unknown: AllowUnknown = None,
) -> None:
    """Write a checkpoint in the formats of a chip, shard by shard.

    Killed, it goes on where it was when the same command runs again; the folder has no config.json
    until it is finished. The source is only read.
    """
    chosen = target_named(target)
    source = chosen_folder("SOURCE", source)
    start = time.monotonic()
    with bytes_bar("converting") as report:
        done = job.convert(
            source, folder, chosen, progress=report, allow_unknown=allow_unknown or ()
        )
    for note in done.notes:
        print(f"dsv4-ascend: note: {note}", file=sys.stderr)
    resumed = f", {done.resumed} of them there already" if done.resumed else ""
    print(
        f"{done.folder}: {target}, {done.shards} shard(s){resumed}, {done.nbytes / 1e9:.3f} GB, "
        f"{time.monotonic() - start:.1f} s"
    )
    if quality:
        profile = chosen.name if chosen.name in PROFILES else None
        _show(measure(source, done.folder, profile, tokens))


def _show(found: Quality) -> None:
    table = Table("class", "max error", "rms error", title="relative to the source's values")
    for name, errors in found.compared.by_class.items():
        table.add_row(name, f"{errors.max:.2e}", f"{errors.rms:.2e}")
    console().print(table)
    for name, errors in found.worst():
        print(f"worst: {name}: max {errors.max:.2e}, rms {errors.rms:.2e}")
    texts = found.perplexities
    if texts is None:
        print(f"perplexity: {found.without}")
    else:
        print(
            f"perplexity over {texts.tokens:,} tokens: {texts.before:.2f} ({texts.before_profile}) "
            f"before, {texts.after:.2f} ({texts.after_profile}) after"
        )
