"""`dsv4-ascend train-tiny`: makes the small model that is shipped,
from the standard library's text and a seed.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, TextColumn

from dsv4_ascend.cli import console, print_json
from dsv4_ascend.model.profile import IDEAL
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import official_tensors
from dsv4_ascend.tiny.corpus import encode_documents, read_corpus, train_tokenizer
from dsv4_ascend.tiny.release import measure, write_release
from dsv4_ascend.tiny.training import TINY, Recipe, train
from dsv4_backend.errors import ArgumentError

EVALUATED_TOKENS = 40960


def train_tiny(
    output: Annotated[
        Path, typer.Option(help="Folder to write; must not exist or be empty.")
    ] = Path("v4-tiny"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = Recipe.steps,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63, help="Seed of initial weights and data order.")
    ] = Recipe.seed,
    evaluated_tokens: Annotated[
        int, typer.Option(min=512, help="Held-out tokens to measure on.")
    ] = EVALUATED_TOKENS,
) -> None:
    """Train a small V4 of the real architecture,
    quantise it to the release's formats and write its folder.

    The same machine type, Python, torch and seed give the same bytes: one thread, so that sums keep
    their order.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError(
            f"--output: found something at {output}, expected a new or empty folder"
        )
    torch.set_num_threads(1)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, TINY.vocab_size)
    stream = encode_documents(tokenizer, corpus.train)
    held_out = encode_documents(tokenizer, corpus.held_out)
    network = Transformer(TINY, IDEAL)
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps, loss=0.0)

        def report(step: int, loss: float, _: float) -> None:
            bar.update(task, completed=step + 1, loss=loss)

        train(network, stream, replace(Recipe(), steps=steps, seed=seed), report)
    trained = dict(official_tensors(network))
    found = measure(trained, stream, held_out, corpus.digest, evaluated_tokens)
    write_release(output, trained, tokenizer, found)
    print_json({"output": str(output), **asdict(found)})
