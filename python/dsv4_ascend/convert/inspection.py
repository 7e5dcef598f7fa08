"""What a checkpoint folder holds, told from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.folder import Survey, survey
from dsv4_ascend.checkpoint.foreign import foreign_format
from dsv4_ascend.checkpoint.layout import FLOAT
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.model.profile import profile_for
from dsv4_ascend.plan.shapes import CLASSES, class_of
from dsv4_backend.errors import CheckpointError, ConfigError

_RELEASES = {"DeepSeek-V4-Flash": V4Config.flash, "DeepSeek-V4-Pro": V4Config.pro}
_VISION = ("vision.", "aligner.", "image_")


@dataclass
class ClassSize:
    """Tensors of one class. formats: how many weights are stored how."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Inspection:
    """A folder: what it is, its sizes by class (plan's classes; `aside` for what is not run)."""

    folder: Path
    release: str
    format: str
    naming: str
    files: int
    classes: dict[str, ClassSize]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size.nbytes for size in self.classes.values())

    @property
    def parameters(self) -> int:
        """Parameters of the layout that are there."""
        return sum(size.parameters for size in self.classes.values())


def inspect(folder: Path, allow_unknown: Collection[str] = ()) -> Inspection:
    """Look at a folder. CheckpointError or ConfigError where nothing can be told about it."""
    seen, foreign = surveyed(folder, allow_unknown)
    return Inspection(
        folder,
        release_of(seen),
        format_of(seen),
        seen.format,
        len(seen.files),
        _classes(seen),
        seen.notes,
        tuple([foreign] if foreign else []) + seen.problems,
    )


def surveyed(folder: Path, allow_unknown: Collection[str] = ()) -> tuple[Survey, str | None]:
    """The survey of a folder, and what it is if it has problems and is no V4 checkpoint as it
    stands. Errors as `inspect`'s.
    """
    try:
        seen = survey(folder, allow_unknown)
    except (ConfigError, CheckpointError):
        foreign = foreign_format(folder)
        if foreign is None:
            raise
        raise checkpoint_error(folder, [foreign]) from None
    return seen, foreign_format(folder) if seen.problems and not seen.kinds else None


def release_of(seen: Survey) -> str:
    """The release that the sizes are of, and what differs from it."""
    config = seen.config
    told = [_base(config)]
    if config.dspark is not None:
        told.append(f"{config.num_nextn_predict_layers} DSpark stages")
    elif config.num_nextn_predict_layers:
        told.append(f"{config.num_nextn_predict_layers} MTP block(s)")
    elif not seen.problems:  # else they may be among what is missing
        told.append("no drafts")
    if any(name.startswith(_VISION) for name in seen.aside):
        told.append("parts for images (Vision-Exp)")
    return ", ".join(told)


def _base(config: V4Config) -> str:
    for name, make in _RELEASES.items():
        full = make()
        if config.hidden_size == full.hidden_size:
            told = name
            if config.num_hidden_layers != full.num_hidden_layers:
                told += f", {config.num_hidden_layers} of {full.num_hidden_layers} layers"
            if config.n_routed_experts != full.n_routed_experts:
                told += f", {config.n_routed_experts} of {full.n_routed_experts} experts"
            return told
    return (
        f"no release: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.n_routed_experts} experts"
    )


def format_of(seen: Survey) -> str:
    """A target of `convert`, or "official"; and the forms of weights that it has."""
    forms = Counter(_form(seen, name) for name, e in seen.layout.items() if e.scale_name)
    forms.pop("missing", None)
    if seen.kinds:
        name = profile_for(set(seen.kinds.values())).name
    else:
        name = "official" if set(forms) - set(FLOAT) else "bf16"
    if not forms:
        return "unknown: no weight of a linear layer is there"
    told = ", ".join(f"{form} {count}" for form, count in sorted(forms.items()))
    return f"{name} ({told})"


def _form(seen: Survey, name: str) -> str:
    source = seen.sources.get(name)
    return "missing" if source is None else seen.layout[name].form(source.dtype)


def _classes(seen: Survey) -> dict[str, ClassSize]:
    found = {name: ClassSize() for name in (*CLASSES, "aside")}
    for name, source in seen.sources.items():
        size = found[class_of(name)]
        size.tensors += 1
        size.nbytes += source.nbytes
        entry = seen.layout.get(name)
        if entry is not None:
            size.parameters += prod(entry.shape) if not name.endswith("tid2eid") else 0
            size.formats[_form(seen, name)] += 1
    for source in seen.aside.values():
        found["aside"].tensors += 1
        found["aside"].nbytes += source.nbytes
    return {name: size for name, size in found.items() if size.tensors}
