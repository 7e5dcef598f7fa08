"""Reading every value of a checkpoint folder, and naming what looks wrong."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from dsv4_ascend.checkpoint.experts import EXPERT
from dsv4_ascend.checkpoint.folder import Checkpoint, checkpoint_of
from dsv4_ascend.checkpoint.kinds import MXFP4, MXFP8, OFFSET, W4A8, W8A8
from dsv4_ascend.checkpoint.layout import FLOAT, FP8, INTEGER
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.checkpoint.values import broken, rule_of
from dsv4_ascend.convert.inspection import surveyed
from dsv4_ascend.convert.values import values_of

RMS_RATIO = 16.0
"""How far the rms of a matrix may be from the median of its like, as a factor."""
SATURATED, ZEROS = 0.25, 0.9
"""Which share of a matrix's codes may be the largest ones, and zeros."""
_LIKE = 4
"""How many matrices there must be to have a median that says something."""
_NUMBER = re.compile(r"\.\d+(?=\.)")
_PIECE = 1 << 26

Progress = Callable[[int, int], None]


@dataclass
class _Seen:
    """What is compared when all tensors have been read."""

    rms: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    experts: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))


def verify(
    folder: Path, allow_unknown: Collection[str] = (), progress: Progress | None = None
) -> list[str]:
    """Findings, one line each, in the order of the files; none where nothing looks wrong.

    Looked at are: every problem of form (`inspect`); values of scales, offsets, norms and token
    tables (`checkpoint/values.py`), those of all experts too; NaN and infinities anywhere; matrices
    of zeros; experts that have a matrix of codes in common; the share of a matrix's codes that are
    the largest (SATURATED), or of its values that are zero (ZEROS); its rms against the median of
    its like, the same matrix of other layers and experts (RMS_RATIO). Memory: that of one tensor's
    rows.
    """
    seen, foreign = surveyed(folder, allow_unknown)
    if seen.problems:
        if foreign is not None:
            raise checkpoint_error(folder, [foreign, *seen.problems])
        return list(seen.problems)
    checkpoint = checkpoint_of(folder, seen)
    names = sorted(checkpoint.names(), key=lambda name: _place(checkpoint, name))
    total, done, kept = checkpoint.nbytes, 0, _Seen()
    found: list[str] = []
    for name in names:
        found += _tensor(checkpoint, name, kept)
        done += checkpoint.source(name).nbytes
        if progress is not None:
            progress(done, total)
    for name, source in checkpoint.aside.items():
        rule = rule_of(name, source.dtype, 0, checkpoint.layout) if name.endswith(OFFSET) else None
        if rule is not None:
            found += [
                f"{source.describe(name)}: {t}" for t in broken(source.tensor(), rule, source)
            ]
            source.release()
    return [*found, *_twins(kept), *_outliers(checkpoint, kept)]


def _place(checkpoint: Checkpoint, name: str) -> tuple[str, int]:
    source = checkpoint.source(name)
    return source.file.path.name, source.begin


def _tensor(checkpoint: Checkpoint, name: str, kept: _Seen) -> Iterator[str]:
    source, entry = checkpoint.source(name), checkpoint.layout.get(name)
    experts = checkpoint.config.n_routed_experts
    rule = rule_of(name, source.dtype, experts, checkpoint.layout)
    stored = checkpoint.stored(name)
    if rule is not None:
        yield from (f"{source.describe(name)}: {t}" for t in broken(stored, rule, source))
    expert = EXPERT.fullmatch(name)
    if expert and name.endswith(".weight"):
        which = f"{expert[1]}.{expert[2]}"
        kept.experts[which][name.split(".")[-2]] = _digest(stored)
    if entry is not None and source.dtype not in INTEGER:
        yield from _values(checkpoint, name, kept, rule is None)
        if source.dtype not in FLOAT:
            yield from _codes(checkpoint, name)
    checkpoint.release(name)


def _digest(stored: torch.Tensor) -> bytes:
    digest, flat = hashlib.blake2b(), stored.reshape(-1).view(torch.uint8)
    for first in range(0, len(flat), _PIECE):
        digest.update(flat[first : first + _PIECE].numpy().data)
    return digest.digest()


def _values(checkpoint: Checkpoint, name: str, kept: _Seen, finite: bool) -> Iterator[str]:
    """Non-finite values and matrices of zeros; notes the rms."""
    energy, count, bad, zeros, largest = 0.0, 0, 0, 0, 0.0
    for rows in values_of(checkpoint, name):
        good = rows.isfinite()
        bad += int((~good).sum())
        rows = rows.where(good, 0.0)
        energy += float(rows.double().square().sum()) if rows.numel() else 0.0
        largest = max(largest, float(rows.abs().max())) if rows.numel() else largest
        count, zeros = count + rows.numel(), zeros + int((rows == 0).sum())
    where = checkpoint.source(name).describe(name)
    if bad and finite:
        yield f"{where}: found {bad} of {count} values not finite, expected none"
    if largest == 0 and name.endswith(".weight"):
        yield f"{where}: found zeros alone, expected a matrix that does something (dead)"
    elif len(checkpoint.layout[name].shape) == 2 and name.endswith(".weight"):
        if zeros > ZEROS * count:
            found = f"found {zeros / count:.0%} of its values zeros"
            yield f"{where}: {found}, expected at most {ZEROS:.0%}"
        kept.rms[_NUMBER.sub(".*", name)][name] = (energy / count) ** 0.5


_FORMATS = {FP8: "e4m3", MXFP8: "e4m3", MXFP4: "e2m1", W8A8: "int8", W4A8: "int4"}


def _codes(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    """The share of the largest codes, from how often each byte is there."""
    source, kind = checkpoint.source(name), checkpoint.layout[name].kind
    form = _FORMATS.get(source.dtype if kind is None else kind, "e2m1")
    flat = checkpoint.stored(name).reshape(-1).view(torch.uint8)
    counts = torch.zeros(256, dtype=torch.int64)
    for first in range(0, len(flat), _PIECE):
        counts += torch.bincount(flat[first : first + _PIECE], minlength=256)
    largest, codes = (int((counts * per).sum()) for per in _per_byte(form))
    if SATURATED < largest / codes < 1:
        yield (
            f"{source.describe(name)}: found {largest / codes:.0%} of its codes the largest {form} "
            f"codes, expected at most {SATURATED:.0%}"
        )


def _per_byte(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [256]: how many largest codes and codes every byte holds."""
    byte = torch.arange(256)
    if form == "e4m3":
        return ((byte & 0x7F) == 0x7E).long(), torch.ones(256, dtype=torch.int64)
    if form == "int8":
        code = byte.to(torch.int8).long().abs()
        return (code >= 127).long(), torch.ones(256, dtype=torch.int64)
    halves = torch.stack([byte & 15, byte >> 4])
    largest = (halves & 7) == 7 if form == "e2m1" else (halves >= 7) & (halves <= 9)
    return largest.sum(0), torch.full((256,), 2)


def _twins(kept: _Seen) -> Iterator[str]:
    """Experts, of any layer, that have matrices of the same codes."""
    first: dict[tuple[str, bytes], str] = {}
    for expert, digests in kept.experts.items():
        twins: dict[str, list[str]] = defaultdict(list)
        for matrix, digest in digests.items():
            twin = first.setdefault((matrix, digest), expert)
            if twin != expert:
                twins[twin].append(matrix)
        for twin, matrices in twins.items():
            which = "" if len(matrices) == len(digests) else f" in {', '.join(matrices)}"
            yield f"{expert}: found the same bytes as {twin}{which}, expected experts to differ"


def _outliers(checkpoint: Checkpoint, kept: _Seen) -> Iterator[str]:
    for like, found in kept.rms.items():
        middle = median(found.values())
        for name, rms in found.items() if len(found) >= _LIKE and middle > 0 else ():
            if not middle / RMS_RATIO <= rms <= middle * RMS_RATIO:
                yield (
                    f"{checkpoint.source(name).describe(name)}: found an rms of {rms:.3g}, "
                    f"expected within a factor of {RMS_RATIO:g} of {middle:.3g}, "
                    f"the median of {like}"
                )
