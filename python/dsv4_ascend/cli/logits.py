"""`dsv4-ascend logits`: token ids in, one fp32 tensor `logits [T, vocab]` out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsv4_ascend.cli.inputs import check_ids, read_ids
from dsv4_ascend.cli.loading import AllowUnknown, CheckpointFolder, ProfileName, load_model
from dsv4_ascend.cli.outputs import check_output
from dsv4_ascend.cli.ranks import DataRanks, ExpertRanks, TensorRanks, on_ranks
from dsv4_backend.errors import EnvironmentFault


def logits(
    input_ids: Annotated[
        Path,
        typer.Option(help="JSON list, plain numbers, or .safetensors with one tensor; - is stdin."),
    ],
    output: Annotated[Path, typer.Option(help="Where to write the safetensors file.")],
    checkpoint: CheckpointFolder = None,
    profile: ProfileName = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Prefill in chunks of this many tokens (512).")
    ] = None,
    decode_from: Annotated[
        int | None, typer.Option(min=0, help="From this position on, one token at a time.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or npu.")] = "cpu",
    allow_unknown: AllowUnknown = None,
    tp: TensorRanks = None,
    ep: ExpertRanks = None,
    dp: DataRanks = None,
) -> None:
    """Compute the logits of every position of one sequence."""
    check_output(output, "--output")
    ids = read_ids(input_ids)
    with on_ranks(device, tp, ep, dp) as (parallel, own):
        model = load_model(checkpoint, own, profile, allow_unknown, parallel)
        check_ids(ids, model.config.vocab_size)
        result = model.forward(ids, chunk=chunk, decode_from=decode_from)
        if parallel.leads:
            _write(output, result.cpu().contiguous())


def _write(output: Path, result: torch.Tensor) -> None:
    """The file complete, or not at all."""
    unfinished = output.with_name(f".{output.name}.part")
    try:
        save_file({"logits": result}, unfinished)
        unfinished.replace(output)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"--output: {output} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
