"""Configurations in files: the hub's and transformers' config.json,
the official inference/config.json (spec 1.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4_ascend.arguments import names_of
from dsv4_ascend.checkpoint.config import (
    DSpark,
    V4Config,
    config_error,
    contradictions,
    found,
    kinds_of_ratios,
)  # fmt: skip
from dsv4_ascend.checkpoint.config_fields import (
    CONSTANTS,
    DSPARK_NAMES,
    LAYER_TYPES,
    OFFICIAL_NAMES,
    QUANTISATION,
    WRITTEN_CONSTANTS,
)  # fmt: skip
from dsv4_ascend.checkpoint.config_reader import MISSING, Reader
from dsv4_ascend.checkpoint.strict_json import FileProblem, read_object

CONFIG = "config.json"
_MAX_BYTES = 2**20
Noted = tuple[V4Config, tuple[str, ...]]
"""A configuration and what its reader noticed, one line each."""


def read_config(folder: Path, allow_unknown: Collection[str] = ()) -> V4Config:
    """The configuration of a checkpoint folder: `config.json`,
    else the official `inference/config.json`.

    ConfigError when there is none, when it is no unambiguous JSON object, or as
    `config_from_dict` says.
    """
    return read_noted_config(folder, allow_unknown)[0]


def read_noted_config(folder: Path, allow_unknown: Collection[str] = ()) -> Noted:
    """As `read_config`, with the notes of `noted_config`."""
    path = folder / CONFIG
    if not path.exists() and (folder / "inference" / CONFIG).exists():
        path = folder / "inference" / CONFIG
    try:
        raw = read_object(path, _MAX_BYTES)
    except FileProblem as problem:
        raise config_error(str(path), [str(problem)]) from None
    return noted_config(raw, str(path), allow_unknown)


def config_from_dict(
    raw: Mapping[str, Any], where: str = "config", allow_unknown: Collection[str] = ()
) -> V4Config:
    """The configuration in a parsed config.json of either naming.

    One ConfigError names every missing, unknown, unsupported and contradictory field. A hub
    configuration needs `compress_ratios` or `layer_types`: without them it is ambiguous (spec 1.2).

    Draft layers: `num_nextn_predict_layers` (official `n_mtp_layers`) says how many, but with
    `dspark_*` fields, where the hub's is out of date, it is the number of `compress_ratios`
    behind those of the layers. What stands in it behind the layers belongs to drafts, which
    only have a window, and is not read; fewer entries than layers are an error. `layer_types`
    and `mlp_layer_types` may be longer than the layers too, and `num_hash_layers` larger, as
    in a folder of the first layers only. The tensors of a checkpoint have the last word on
    drafts (stored.py).

    An unknown field is an error, unless its name cannot belong to a part of the model
    (`is_informative`), its value is null, or `allow_unknown`, a collection of names, has its name
    (as the error shows it; else ArgumentError).
    """
    return noted_config(raw, where, allow_unknown)[0]


def noted_config(
    raw: Mapping[str, Any], where: str = "config", allow_unknown: Collection[str] = ()
) -> Noted:
    """As `config_from_dict`,
    with one note for the fields that were ignored and one for each other surprise.
    """
    try:
        copy = json.loads(json.dumps(raw, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise config_error(
            where, [f"found what is no JSON ({error}), expected a parsed config.json"]
        ) from None
    reader = Reader(copy, names_of("allow_unknown", allow_unknown))
    official = any(name in raw for name in ("dim", "n_layers", "n_heads"))
    values = reader.sizes(
        OFFICIAL_NAMES if official else {name: name for name in OFFICIAL_NAMES}, official
    )
    for name, allowed in CONSTANTS.items():
        reader.constant(reader.left, name, allowed)
    reader.hash_layers(values)
    reader.drafter(values)
    reader.schedule(values)
    reader.tokens(values)
    if official:
        reader.official_only(values)
    else:
        reader.hub_only(values)
    reader.problems += [f"{name}: missing" for name, value in values.items() if value is MISSING]
    values = {name: value for name, value in values.items() if value is not MISSING}
    reader.unknown("", reader.left)
    reader.problems += contradictions(values)
    if reader.problems:
        raise config_error(where, reader.problems)
    return V4Config(**values), reader.all_notes()


def config_to_dict(config: V4Config) -> dict[str, Any]:
    """The hub's config.json of a configuration;
    `config_from_dict` gives the same configuration back.

    Layers are written as `compress_ratios`; when these do not imply the kinds, as `layer_types` and
    `compress_rates`. ConfigError when neither can say it (several CSA ratios other than 4).
    """
    raw: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    raw |= {name: getattr(config, name) for name in OFFICIAL_NAMES}
    raw |= {name: CONSTANTS[name][0] for name in WRITTEN_CONSTANTS}
    raw |= {
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
    }
    eos = config.eos_token_ids
    raw["eos_token_id"] = list(eos) if len(eos) > 1 else config.eos_token_id
    raw["rope_scaling"] = (
        None if config.rope_scaling is None else {"type": "yarn", **asdict(config.rope_scaling)}
    )
    raw["swiglu_limit"] = config.swiglu_limit if math.isfinite(config.swiglu_limit) else 0.0
    raw["torch_dtype"] = "bfloat16"
    raw |= _schedule_to_dict(config)
    if config.quantized:
        raw["quantization_config"] = {name: allowed[0] for name, allowed in QUANTISATION.items()}
        raw["expert_dtype"] = config.expert_dtype
    return raw | _drafter_to_dict(config.dspark)


def _drafter_to_dict(dspark: DSpark | None) -> dict[str, Any]:
    """Nothing unless the target layers are known: then only the tensors can tell of the drafter."""
    if dspark is None or dspark.target_layer_ids is None:
        return {}
    return {theirs: getattr(dspark, ours) for ours, theirs in DSPARK_NAMES.items()}


def _schedule_to_dict(config: V4Config) -> dict[str, Any]:
    if kinds_of_ratios(config.compress_ratios) == config.layer_kinds:
        return {"compress_ratios": list(config.compress_ratios)}
    kept = config.num_hidden_layers
    ratios: dict[str, set[int]] = {}
    for kind, ratio in zip(config.layer_kinds[:kept], config.compress_ratios[:kept], strict=True):
        ratios.setdefault(kind, set()).add(ratio)
    several = sorted(kind for kind, used in ratios.items() if len(used) > 1)
    if several:
        line = found(
            "compress_ratios",
            config.compress_ratios,
            f"one ratio for all {' and '.join(several)} layers",
        )
        raise config_error("config.json", [line])
    rates = {
        LAYER_TYPES["csa"]: min(ratios.get("csa", {4})),
        LAYER_TYPES["hca"]: min(ratios.get("hca", {128})),
    }
    return {
        "layer_types": [LAYER_TYPES[kind] for kind in config.layer_kinds[:kept]],
        "compress_rates": rates,
    }
