"""`dsv4-ascend logits`: token ids in, one fp32 tensor `logits [T, vocab]` out."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv4_ascend.cli.loading import load_model
from dsv4_ascend.model.strict_json import FileProblem, parse
from dsv4_backend.errors import ArgumentError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def read_ids(path: Path) -> list[int]:
    """A JSON list of ids, or the only tensor of a safetensors file. ArgumentError says what the file holds instead."""
    if not os.path.isfile(path):
        raise ArgumentError(f"--input-ids: no file {path}")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    try:
        ids = parse(path.read_bytes())
    except FileProblem as error:
        raise ArgumentError(f"--input-ids: {path} is neither JSON nor named *.safetensors: {error}") from error
    if not isinstance(ids, list):
        raise ArgumentError(f"--input-ids: {path} holds {type(ids).__name__}, expected a list of integers")
    for position, token in enumerate(ids):
        if type(token) is not int:
            raise ArgumentError(f"--input-ids: {token!r:.40} at position {position}, expected an integer")
    return ids


def _from_safetensors(path: Path) -> list[int]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise ArgumentError(f"--input-ids: {path} holds {len(names)} tensors, expected one")
            tensor = file.get_tensor(names[0])
    except SafetensorError as error:
        raise ArgumentError(f"--input-ids: {path} is not a safetensors file: {error}") from error
    if tensor.dim() != 1 or tensor.dtype not in _INTEGERS:
        raise ArgumentError(f"--input-ids: {names[0]!r} is {tensor.dtype} {tuple(tensor.shape)}, expected integers [T]")
    return tensor.tolist()  # type: ignore[no-any-return]


def logits(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    input_ids: Annotated[Path, typer.Option(help="JSON list, or a safetensors file with one tensor.")],
    output: Annotated[Path, typer.Option(help="Where to write the safetensors file.")],
    profile: Annotated[str, typer.Option(help="official (bf16) or ideal (fp32).")] = "official",
    chunk: Annotated[int | None, typer.Option(min=1, help="Prefill in chunks of this many tokens (512).")] = None,
    decode_from: Annotated[int | None, typer.Option(min=0, help="From this position on, one token at a time.")] = None,
    device: Annotated[str, typer.Option(help="cpu or npu.")] = "cpu",
) -> None:
    """Compute the logits of every position of one sequence."""
    if os.path.isdir(output) or not os.path.isdir(output.parent):
        raise ArgumentError(f"--output: found {output}, expected a file in an existing folder")
    ids = read_ids(input_ids)
    model = load_model(checkpoint, device, profile)
    limit = model.config.vocab_size
    for position, token in enumerate(ids):
        if not 0 <= token < limit:
            raise ArgumentError(f"--input-ids: {token} at position {position}, expected ids in [0, {limit})")
    result = model.forward(ids, chunk=chunk, decode_from=decode_from)
    _write(output, result.cpu().contiguous())


def _write(output: Path, result: torch.Tensor) -> None:
    """The file complete, or not at all."""
    unfinished = output.with_name(f".{output.name}.part")
    try:
        save_file({"logits": result}, unfinished)
        unfinished.replace(output)
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"--output: {output} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
