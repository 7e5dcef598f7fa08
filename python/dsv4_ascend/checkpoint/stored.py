"""What the stored tensors say about the configuration: they decide on drafts and on formats."""

from __future__ import annotations

import re
from dataclasses import replace

from dsv4_ascend.checkpoint.config import DSpark, V4Config
from dsv4_ascend.checkpoint.layout import FP4, FP8
from dsv4_ascend.checkpoint.sources import Sources

_STAGE = re.compile(r"mtp\.(\d{1,4})\.(.*)", re.ASCII | re.DOTALL)
_DSPARK_PARTS = ("main_proj.", "main_norm.", "markov_head.", "confidence_head.")
_MARKOV = "markov_head.markov_w1.weight"
_MAIN = "mtp.0.main_proj.weight"
_FORMATS = {FP8: "fp8"} | dict.fromkeys(FP4, "fp4")


def as_stored(
    config: V4Config, sources: Sources, formats: bool = True
) -> tuple[V4Config, list[str]]:
    """The configuration corrected by the names, dtypes and shapes of the tensors,
    and notes on what was corrected.

    Draft layers are the `mtp.N` blocks that are there, whatever a field promises; they are DSpark's
    if one of its own parts is among them. Weights are quantised if one of them is stored so. The
    expert format of the configuration holds if all quantised experts are stored in it; it is None
    if layers differ. formats: whether dtypes tell of formats, as they do in official folders.
    ConfigError if the result is no V4 model.
    """
    config, drafts = _stored_drafts(config, sources)
    config, corrected = _stored_formats(config, sources) if formats else (config, [])
    return config, drafts + corrected


def _stored_drafts(config: V4Config, sources: Sources) -> tuple[V4Config, list[str]]:
    stages: dict[str, list[str]] = {}
    for name in sources:
        match = _STAGE.fullmatch(name) if name.startswith("mtp.") else None
        if match:
            stages.setdefault(match.group(1), []).append(match.group(2))
    promised, count = config.num_nextn_predict_layers, len(stages)
    parts = [part for names in stages.values() for part in names]
    dspark = None
    if any(part.startswith(_DSPARK_PARTS) for part in parts):
        dspark = config.dspark or _stored_drafter(config, sources)
    notes = []
    if dspark is not None:
        notes.append(
            f"{count} DSpark draft stages (mtp.*) are not run: "
            "drafting with DSpark is not implemented"
        )
    elif promised and not count:
        notes.append(
            f"{promised} draft layers promised, no mtp.* tensors found: opened without drafts"
        )
    if (count, dspark) == (promised, config.dspark):
        return config, notes
    return config.with_drafts(count, dspark), notes


def _stored_drafter(config: V4Config, sources: Sources) -> DSpark:
    """The sizes of a drafter that the configuration does not mention;
    1 where a tensor is missing or has no sizes.
    """
    ranks = [
        source.shape[-1]
        for name, source in sources.items()
        if name.endswith(_MARKOV) and source.shape
    ]
    width = sources[_MAIN].shape[-1] if _MAIN in sources and sources[_MAIN].shape else 0
    return DSpark(markov_rank=max([1, *ranks]), targets=max(1, width // config.hidden_size))


def _stored_formats(config: V4Config, sources: Sources) -> tuple[V4Config, list[str]]:
    weights = {name: source.dtype for name, source in sources.items() if source.dtype in _FORMATS}
    layers: dict[str, set[str]] = {}
    for name, dtype in weights.items():
        if ".ffn.experts." in name:
            layers.setdefault(name.partition(".ffn.")[0], set()).add(_FORMATS[dtype])
    experts = set().union(*layers.values())
    # A mixture within a layer is an error (fit.py), which the configured format explains better.
    by_layer = len(experts) > 1 and all(len(formats) == 1 for formats in layers.values())
    changes: dict[str, object] = {}
    if weights and not config.quantized:
        changes["quantized"] = True
    if config.expert_dtype is not None and (
        by_layer or (experts and config.expert_dtype not in experts)
    ):
        changes["expert_dtype"] = None if by_layer else min(experts)
    both = " and ".join(map(repr, sorted(experts)))
    told = {name: both if value is None else repr(value) for name, value in changes.items()}
    notes = [f"the configuration says {name} {getattr(config, name)!r}, what is stored {stored}"
             for name, stored in told.items()]  # fmt: skip
    return replace(config, **changes) if changes else config, notes  # type: ignore[arg-type]
