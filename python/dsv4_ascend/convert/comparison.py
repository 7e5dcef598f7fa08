"""Two folders of one model, tensor by tensor: the same bytes, the same values, or how far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv4_ascend.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.convert.values import values_of
from dsv4_ascend.plan.shapes import class_of


@dataclass
class Errors:
    """Of values beside those they stand for: largest difference over the largest finite value, and
    rms over rms; infinite where one of the two is not finite or another infinity. Sums are kept so
    that those of several tensors are one.
    """

    largest_error: float = 0.0
    largest: float = 0.0
    error_energy: float = 0.0
    energy: float = 0.0

    @property
    def max(self) -> float:
        """The largest difference, relative to the largest value."""
        return self.largest_error / self.largest if self.largest else self.largest_error

    @property
    def rms(self) -> float:
        """The rms of differences, relative to the rms of values."""
        return math.sqrt(self.error_energy / self.energy if self.energy else self.error_energy)

    def as_json(self) -> dict[str, float | None]:
        """Both, for programs; None if infinite."""
        both = {"max": self.max, "rms": self.rms}
        return {name: value if math.isfinite(value) else None for name, value in both.items()}

    def add(self, values: torch.Tensor, others: torch.Tensor) -> None:
        """Count some values and what stands for them."""
        if values.numel():
            equal = (others == values) | (others.isnan() & values.isnan())
            error = (others - values).double().masked_fill(equal, 0.0).nan_to_num(nan=math.inf)
            finite = values.double().where(values.isfinite(), 0.0)
            self.largest_error = max(self.largest_error, float(error.abs().max()))
            self.largest = max(self.largest, float(finite.abs().max()))
            self.error_energy += float(error.square().sum())
            self.energy += float(finite.square().sum())


@dataclass
class Comparison:
    """same: tensors with the same bytes, scales among them; other_scales: weights of the same
    values but other codes, with (scales that differ, all scales), None where formats differ;
    other_values: weights whose values differ. by_class: errors of all weights of a class.
    """

    same: int = 0
    other_scales: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    other_values: dict[str, Errors] = field(default_factory=dict)
    by_class: dict[str, Errors] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What to tell, the worst last."""
        told = [f"{self.same} weights have the same bytes"]
        for name, scales in self.other_scales.items():
            counted = scales and f"{scales[0]} of {scales[1]} scales differ"
            how = counted or "another format, or zeros of another sign"
            told.append(f"{name}: the same values in other codes: {how}")
        for name, errors in sorted(self.other_values.items(), key=lambda pair: pair[1].rms):
            told.append(f"{name}: other values: max {errors.max:.3g}, rms {errors.rms:.3g}")
        return told

    def as_json(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "same_bytes": self.same,
            "other_scales": self.other_scales,
            "other_values": {name: e.as_json() for name, e in self.other_values.items()},
        }


def compare(original: Path, folder: Path) -> Comparison:
    """Compare a folder's weights with those of the original, in the memory of one tensor's rows.

    CheckpointError if a folder does not open, or they are not of one model.
    """
    first, second = open_checkpoint(original), open_checkpoint(folder)
    differing = _shapes(first) ^ _shapes(second)
    if differing:
        name, shape = min(differing)
        raise checkpoint_error(folder, [f"{name} {shape}: found in one of the folders alone"])
    found = Comparison()
    for name, entry in first.layout.items():
        errors = Errors()
        for values, others in zip(values_of(first, name), values_of(second, name), strict=True):
            errors.add(values, others)
        of_class = found.by_class.setdefault(class_of(name), Errors())
        _merge(of_class, errors)
        if errors.largest_error:
            found.other_values[name] = errors
        elif _same(first, second, name):
            found.same += 1
        else:
            found.other_scales[name] = _scales(first, second, entry.scale_name)
    return found


def _shapes(checkpoint: Checkpoint) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, entry.shape) for name, entry in checkpoint.layout.items()}


def _merge(into: Errors, errors: Errors) -> None:
    into.largest_error = max(into.largest_error, errors.largest_error)
    into.largest = max(into.largest, errors.largest)
    into.error_energy += errors.error_energy
    into.energy += errors.energy


def _same(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    scale = first.layout[name].scale_name
    names = [name] if scale is None or scale not in first else [name, scale]
    return all(
        n in second and first.source(n).dtype == second.source(n).dtype and _equal(first, second, n)
        for n in names
    )


def _equal(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    one, other = first.stored(name), second.stored(name)
    return one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _scales(first: Checkpoint, second: Checkpoint, name: str | None) -> tuple[int, int] | None:
    if name is None or name not in first or name not in second:
        return None
    one, other = first.tensor(name), second.tensor(name)
    if one.shape != other.shape or one.dtype != other.dtype:
        return None
    return int((one.float() != other.float()).sum()), one.numel()
