"""Formats of other quantisers and engines, known by their marks,
so that an error can name them in its first line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from dsv4_ascend.checkpoint.kinds import DESCRIPTION
from dsv4_ascend.checkpoint.strict_json import FileProblem, open_regular, parse, read_object

JOURNAL = "conversion.unfinished.json"
"""In a folder that a conversion has not finished: what it is made of."""
_RELEASE = "the official release (FP8 and FP4 safetensors) or a BF16 copy of it"
_OFFICIAL = f"use {_RELEASE}"
_MAX_CONFIG, _MAX_INDEX, _MAX_HEADER, _MAX_FILES = 2**20, 16 * 2**20, 8 * 2**20, 4


class Mark(NamedTuple):
    """A format and how it is known: a file's name, endings of tensor names,
    or the configuration's quant_method.
    """

    name: str
    endings: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    file: str = r"(?!)"
    advice: str = _OFFICIAL


_ASCEND = "quantisation of msModelSlim"
_MARKS = (
    Mark(
        _ASCEND,
        ("weight_offset", ".deq_scale", ".quant_bias"),
        ("ascend",),
        r"quant_model_description.*\.json",
    ),
    Mark("NVFP4 (NVIDIA ModelOpt)", (".weight_scale_2",), ("modelopt", "modelopt_fp4", "nvfp4")),
    Mark("compressed-tensors", (".weight_packed", ".weight_global_scale"), ("compressed-tensors",)),
    Mark("AWQ", (), ("awq",)),
    Mark("AutoRound", (), ("auto-round", "autoround", "auto_round", "intel/auto-round")),
    Mark(
        "GPTQ or a format alike (AWQ, AutoRound)",
        (".qweight", ".qzeros", ".g_idx"),
        ("gptq", "gptqmodel"),
    ),
    Mark("bitsandbytes", (".absmax", ".quant_map"), ("bitsandbytes",)),
    Mark("MLX", (".scales", ".biases")),
    Mark("GGUF", file=r"(?i:.*\.gguf)", advice=f"give a folder of safetensors: {_RELEASE}"),
)
"""The first that fits is named:
the more special marks come before those that they share names with.
"""


def foreign_format(path: Path) -> str | None:
    """What a folder that does not open is, and what to do, in one line;
    None if it has no mark of another format.
    """
    if (path / JOURNAL).exists() and not (path / "config.json").exists():
        return f"an unfinished conversion ({JOURNAL}): run `dsv4-ascend convert` again to finish it"
    if path.suffix.lower() == ".gguf":
        files, config = [path.name], {}
    else:
        files, config = _listing(path), _object(path / "config.json", _MAX_CONFIG)
    quantisation = config.get("quantization_config")
    method = (
        str(quantisation.get("quant_method", "")).lower() if isinstance(quantisation, dict) else ""
    )
    names = _tensor_names(path, files)
    for mark in _MARKS:
        found = _found(mark, files, method, names)
        described = any(re.fullmatch(mark.file, file) for file in files)
        if found and mark.name == _ASCEND and not described:
            return (
                f"{mark.name} ({', '.join(found)}) without {DESCRIPTION}, which says what its "
                f"weights are: restore it, or {_OFFICIAL}"
            )
        if found:
            return f"{_title(mark, path, files)} ({', '.join(found)}): not read here; {mark.advice}"
    if method not in ("", "fp8"):
        return f"quantised by {ascii(method)[1:-1][:60]} (quant_method): not read here; {_OFFICIAL}"
    return None


def _found(mark: Mark, files: list[str], method: str, names: list[str]) -> list[str]:
    marked = [file for file in files if re.fullmatch(mark.file, file)][:1]
    if marked and mark.name == "GGUF" and any(file.endswith(".safetensors") for file in files):
        marked = []
    endings = [ending for ending in mark.endings if any(name.endswith(ending) for name in names)]
    return [*marked, *([f"quant_method {method}"] if method in mark.methods else []), *endings]


def _title(mark: Mark, path: Path, files: list[str]) -> str:
    """MsModelSlim's description file says which of its formats it is."""
    described = (
        [file for file in files if re.fullmatch(mark.file, file)] if mark.name == _ASCEND else []
    )
    kind = _object(path / described[0], _MAX_INDEX).get("model_quant_type") if described else None
    return f"{ascii(kind)[1:-1][:40]} {mark.name}" if isinstance(kind, str) else mark.name


def _listing(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError):
        return []


def _object(path: Path, limit: int) -> dict[str, object]:
    try:
        return read_object(path, limit)
    except FileProblem:
        return {}


def _tensor_names(path: Path, files: list[str]) -> list[str]:
    """Names in the index, else in the headers of the first files;
    nothing for what cannot be read.
    """
    index = _object(path / "model.safetensors.index.json", _MAX_INDEX).get("weight_map")
    if isinstance(index, dict):
        return list(index)
    stored = [file for file in files if file.endswith(".safetensors")][:_MAX_FILES]
    return [name for file in stored for name in _header_names(path / file)]


def _header_names(path: Path) -> list[str]:
    try:
        descriptor, _ = open_regular(path)
    except FileProblem:
        return []
    with os.fdopen(descriptor, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = parse(file.read(length)) if length <= _MAX_HEADER else {}
        except FileProblem:
            return []
    return list(header) if isinstance(header, dict) else []
