"""Known fields taken out of a raw configuration, of either naming, one group after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsv4_ascend.checkpoint.config import (
    DSpark,
    RopeScaling,
    found,
    is_int,
    is_number,
    kinds_of_ratios,
    wrong_drafter,
)  # fmt: skip
from dsv4_ascend.checkpoint.config_fields import (
    DEFAULTS,
    DSPARK_NAMES,
    FLOAT_EXPERTS,
    KINDS,
    LAYER_TYPES,
    QUANTISATION,
    ROPE_FIXED,
    ROPE_SILENT,
    SILENT,
    is_informative,
)  # fmt: skip

_FRACTIONS = (
    "routed_scaling_factor",
    "swiglu_limit",
    "rope_theta",
    "compress_rope_theta",
    "hc_eps",
    "rms_norm_eps",
)

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""The value of a field that must be there and is not."""


class Reader:
    """Takes known fields out of a raw configuration;
    what is left is unknown. Collects problems and notes.
    """

    def __init__(self, raw: dict[str, Any], allow_unknown: frozenset[str]) -> None:
        self.left = raw
        self.allowed = allow_unknown
        self.unmatched = set(allow_unknown)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.ignored: list[str] = []

    def all_notes(self) -> tuple[str, ...]:
        """The notes, with the ignored fields in one of them."""
        names = ", ".join(sorted(self.ignored))
        silent = [f"configuration fields without effect here: {names}"] if names else []
        unmatched = [f"allow_unknown: no unknown configuration field {ascii(name)[1:-1][:100]}"
                     for name in sorted(self.unmatched)]  # fmt: skip
        return (*self.notes, *silent, *unmatched)

    def unknown(self, prefix: str, fields: Mapping[str, Any]) -> None:
        """Sort the fields that nobody took: silent, informative or null, allowed,
        and else a problem.
        """
        for name in sorted(fields):
            # From outside: shortened, and without control characters.
            shown = prefix + ascii(name)[1:-1][:100]
            if prefix + name in SILENT:
                continue
            if shown in self.allowed:
                self.unmatched.discard(shown)
                self.notes.append(f"unknown configuration field {shown}: ignored, as allowed")
            elif is_informative(name) or fields[name] is None:
                self.ignored.append(shown)
            else:
                hint = f"if it does not, --allow-unknown {shown} or load(..., allow_unknown=[...])"
                self.problems.append(
                    f"{shown}: unknown field, which may change what the model computes; {hint}"
                )

    def sizes(self, names: Mapping[str, str], official: bool) -> dict[str, Any]:
        """The fields of `OFFICIAL_NAMES`; numbers that may be fractional become floats."""
        # The official code has no clamp unless a limit is given.
        defaults = DEFAULTS | ({"swiglu_limit": 0} if official else {})
        values = {
            ours: self.left.pop(theirs, defaults.get(ours, MISSING))
            for ours, theirs in names.items()
        }
        if values["swiglu_limit"] is None or (
            is_number(values["swiglu_limit"]) and values["swiglu_limit"] == 0
        ):
            values["swiglu_limit"] = math.inf
        for name in _FRACTIONS:
            values[name] = float(values[name]) if is_number(values[name]) else values[name]
        return values

    def constant(
        self, fields: dict[str, Any], name: str, allowed: tuple[object, ...], prefix: str = ""
    ) -> None:
        """Take a field that must have one of a few values, if it is there."""
        value = fields.pop(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            self.problems.append(found(prefix + name, value, " or ".join(map(repr, allowed))))

    def tokens(self, values: dict[str, Any]) -> None:
        """Token ids and the longest context; `eos_token_id` may be one id, several or null."""
        values["bos_token_id"] = self.left.pop("bos_token_id", 0)
        eos = self.left.pop("eos_token_id", 1)
        values["eos_token_ids"] = (
            tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        )
        values["max_position_embeddings"] = self.left.pop("max_position_embeddings", 1048576)

    def drafter(self, values: dict[str, Any]) -> None:
        """DSpark, if its fields say enough to know its tensors."""
        given = {
            ours: self.left.pop(theirs)
            for ours, theirs in DSPARK_NAMES.items()
            if theirs in self.left
        }
        ids = given.get("target_layer_ids")
        given |= {"target_layer_ids": tuple(ids)} if isinstance(ids, list) else {}
        for name, expected in wrong_drafter(
            {k: v for k, v in given.items() if v is not None}
        ).items():
            self.notes.append(
                f"{found(DSPARK_NAMES[name], given.pop(name), expected)}: ignored with the drafter"
            )
        ids = given.get("target_layer_ids")
        values["dspark"] = None
        if given.get("markov_rank") is not None and ids:
            values["dspark"] = DSpark(**(given | {"targets": len(ids)}))
        elif given:
            self.ignored += [DSPARK_NAMES[name] for name in given]

    def schedule(self, values: dict[str, Any]) -> None:
        """Layer kinds and ratios from `compress_ratios`,
        or from transformers' `layer_types` and `compress_rates`.
        """
        layers = values["num_hidden_layers"]
        ratios = self.left.pop("compress_ratios", None)
        types = self.left.pop("layer_types", None)
        rates = self.left.pop("compress_rates", {})
        if ratios is None and types is None:
            self.problems.append(
                "compress_ratios: missing, and no layer_types either: "
                "the layers' attention is ambiguous"
            )
            return
        behind = max(0, len(ratios) - layers) if isinstance(ratios, list) and is_int(layers) else 0
        if values["num_nextn_predict_layers"] is MISSING or (
            values["dspark"] and ratios is not None
        ):
            values["num_nextn_predict_layers"] = behind
        drafts = values["num_nextn_predict_layers"]
        drafts = drafts if is_int(drafts) and 0 <= drafts < 100 else 0
        if types is not None:
            self._types(values, types, rates, drafts)
        if ratios is not None:
            ratios = _cut(ratios, layers, drafts) if isinstance(ratios, list) else ratios
            ratios = tuple(ratios) if isinstance(ratios, list) else ratios
            if ratios != values.get("compress_ratios", ratios):
                self.problems.append(
                    found(
                        "compress_ratios",
                        ratios,
                        f"{values['compress_ratios']} as layer_types says",
                    )
                )
            if types is None:
                values["compress_ratios"] = ratios
                values["layer_kinds"] = kinds_of_ratios(ratios) if isinstance(ratios, tuple) else ()
        if not drafts:
            values["dspark"] = None

    def _types(self, values: dict[str, Any], types: object, rates: object, drafts: int) -> None:
        """Sets nothing if one of them is wrong, so that no second problem follows from it."""
        before, layers = len(self.problems), values["num_hidden_layers"]
        types = _first(types, layers)
        if not isinstance(types, list) or not all(
            isinstance(name, str) and name in KINDS for name in types
        ):
            self.problems.append(found("layer_types", types, f"a list of {', '.join(KINDS)}"))
        elif is_int(layers) and len(types) < layers:
            self.problems.append(
                found("layer_types", f"{len(types)} entries", f"num_hidden_layers {layers} entries")
            )
        if not isinstance(rates, dict) or not set(rates) <= set(KINDS):
            self.problems.append(
                found("compress_rates", rates, f"an object with {', '.join(KINDS)}")
            )
        if (
            len(self.problems) > before
            or not isinstance(types, list)
            or not isinstance(rates, dict)
        ):
            return
        kinds = [KINDS[name] for name in types]
        rate = {
            "swa": 0,
            "csa": rates.get(LAYER_TYPES["csa"], 4),
            "hca": rates.get(LAYER_TYPES["hca"], 128),
        }
        values["layer_kinds"] = tuple(kinds + ["swa"] * drafts)
        values["compress_ratios"] = tuple([rate[kind] for kind in kinds] + [0] * drafts)

    def hub_only(self, values: dict[str, Any]) -> None:
        """Fields that only the hub and transformers write."""
        quantisation = self.left.pop("quantization_config", None)
        expert_dtype = self.left.pop("expert_dtype", None)
        values["quantized"] = quantisation is not None
        if isinstance(quantisation, dict):
            expert_dtype = quantisation.pop("expert_dtype", expert_dtype)
            for name, allowed in QUANTISATION.items():
                self.constant(quantisation, name, allowed, "quantization_config.")
            self.unknown("quantization_config.", quantisation)
        elif quantisation is not None:
            self.problems.append(found("quantization_config", quantisation, "an object"))
        self._expert_dtype(values, expert_dtype)
        self._rope(values)

    def _expert_dtype(self, values: dict[str, Any], expert_dtype: object) -> None:
        """What is stored decides (stored.py): a format without quantisation,
        or a float one, is only noted.
        """
        floats = expert_dtype in FLOAT_EXPERTS
        if floats or (expert_dtype in ("fp4", "fp8") and not values["quantized"]):
            self.notes.append(f"expert_dtype {expert_dtype!r}: what is stored decides")
            expert_dtype = None
        values["expert_dtype"] = expert_dtype

    def hash_layers(self, values: dict[str, Any]) -> None:
        """Hash-routed layers, no more than there are layers;
        transformers' `mlp_layer_types` says the same.
        """
        layers, hashes = values["num_hidden_layers"], values["num_hash_layers"]
        if is_int(layers) and is_int(hashes) and 0 < layers < hashes:
            self.notes.append(
                f"num_hash_layers {hashes}: all of the {layers} layers here are hash-routed"
            )
            values["num_hash_layers"] = layers
        types = _first(self.left.pop("mlp_layer_types", None), layers)
        if types is None:
            return
        hashed = types.count("hash_moe") if isinstance(types, list) else 0
        if types != ["hash_moe"] * hashed + ["moe"] * ((layers if is_int(layers) else 0) - hashed):
            self.problems.append(
                found(
                    "mlp_layer_types", types, "num_hidden_layers entries, hash_moe first, then moe"
                )
            )
        if values["num_hash_layers"] not in (MISSING, hashed):
            self.problems.append(
                found(
                    "num_hash_layers", values["num_hash_layers"], f"{hashed} as in mlp_layer_types"
                )
            )
        values["num_hash_layers"] = hashed

    def _rope(self, values: dict[str, Any]) -> None:
        """`rope_scaling` of the hub,
        or transformers' `rope_parameters` (one object, or main and compress).
        """
        scaling = self.left.pop("rope_scaling", None)
        parameters = self.left.pop("rope_parameters", None)
        if scaling is not None and parameters is not None:
            self.problems.append("rope_scaling: found rope_parameters too, expected one of them")
        rope = parameters if scaling is None else scaling
        factor = self.left.pop("partial_rotary_factor", None)
        if rope is not None and not isinstance(rope, dict):
            self.problems.append(found("rope_scaling", rope, "an object or null"))
            rope = None
        if (
            rope is not None
            and isinstance(rope.get("main"), dict)
            and isinstance(rope.get("compress"), dict)
        ):
            if self._rope_object("rope_parameters.main", rope["main"]) is not None:
                self.problems.append(
                    found("rope_parameters.main", rope["main"], "rope_type default")
                )
            self._agree(values, "rope_theta", rope["main"].get("rope_theta"))
            rope = rope["compress"]
            self._agree(values, "compress_rope_theta", rope.get("rope_theta"))
        factor = factor if factor is not None or rope is None else rope.get("partial_rotary_factor")
        if factor is not None and not (is_number(factor) and 0 < factor <= 1):
            self.problems.append(found("partial_rotary_factor", factor, "a number in (0, 1]"))
        elif factor is not None and is_int(values["head_dim"]):
            self._agree(values, "qk_rope_head_dim", int(values["head_dim"] * factor))
        values["rope_scaling"] = None if rope is None else self._rope_object("rope_scaling", rope)

    def _agree(self, values: dict[str, Any], name: str, nested: object) -> None:
        if values[name] is MISSING and nested is not None:
            values[name] = float(nested) if name.endswith("theta") and is_number(nested) else nested  # type: ignore[arg-type]
        elif nested is not None and nested != values[name]:
            self.problems.append(
                found(name, values[name], f"{nested} as in the nested RoPE parameters")
            )

    def _rope_object(self, where: str, rope: dict[str, Any]) -> RopeScaling | None:
        left = {name: value for name, value in rope.items() if name not in ROPE_SILENT}
        for name, allowed in ROPE_FIXED.items():
            value = left.pop(name, 1)
            if isinstance(value, bool) or value not in allowed:
                self.problems.append(found(f"{where}.{name}", value, "1: V4 scales no magnitudes"))
        kinds = {str(rope[name]) for name in ("type", "rope_type") if name in rope} or {"default"}
        taken = {name: left.pop(name) for name in RopeScaling.__dataclass_fields__ if name in left}
        self.unknown(f"{where}.", left)
        if kinds == {"yarn"}:
            missing = {"factor", "original_max_position_embeddings"} - taken.keys()
            self.problems += [f"{where}.{name}: missing" for name in sorted(missing)]
            return RopeScaling(**taken)
        if kinds != {"default"}:
            self.problems.append(
                found(f"{where}.type", " and ".join(sorted(kinds)), "yarn or default")
            )
        return None

    def official_only(self, values: dict[str, Any]) -> None:
        """Fields of the official ModelArgs; `original_seq_len` 0 switches YaRN off there."""
        names = {"factor": "rope_factor", "original_max_position_embeddings": "original_seq_len",
                 "beta_fast": "beta_fast", "beta_slow": "beta_slow"}  # fmt: skip
        taken = {
            ours: self.left.pop(theirs) for ours, theirs in names.items() if theirs in self.left
        }
        values["rope_scaling"] = (
            RopeScaling(**taken) if taken.get("original_max_position_embeddings") else None
        )
        if values["rope_scaling"] is not None and "factor" not in taken:
            self.problems.append("rope_factor: missing")
        dtype, expert_dtype = self.left.pop("dtype", "fp8"), self.left.pop("expert_dtype", None)
        if dtype not in ("fp8", "bf16"):
            self.problems.append(found("dtype", dtype, "fp8 or bf16"))
        values["quantized"] = dtype == "fp8" or expert_dtype in ("fp4", "fp8")
        self._expert_dtype(values, expert_dtype or ("fp8" if dtype == "fp8" else None))


def _first(entries: Any, layers: Any) -> Any:
    """The entries of the layers, if it is a list and their number is known; else what it is."""
    return (
        entries[:layers] if isinstance(entries, list) and is_int(layers) and layers > 0 else entries
    )


def _cut(ratios: list[Any], layers: Any, drafts: int) -> Any:
    """The entries of the layers and a window-only one per draft;
    a list that is short or has no integers as it is.
    """
    whole = is_int(layers) and len(ratios) >= layers > 0 and all(map(is_int, ratios))
    return _first(ratios, layers) + [0] * drafts if whole else ratios
