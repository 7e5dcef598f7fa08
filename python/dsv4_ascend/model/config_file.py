"""Configurations in files: the hub's and transformers' config.json, the official inference/config.json (spec 1.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4_ascend.model.config import (
    LayerKind,
    RopeScaling,
    V4Config,
    config_error,
    contradictions,
    found,
    is_int,
    is_number,
    kinds_of_ratios,
)  # fmt: skip
from dsv4_ascend.model.strict_json import FileProblem, read_object

CONFIG = "config.json"
_MAX_BYTES = 2**20

_OFFICIAL_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "window_size",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "n_activated_experts",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hash_layers": "n_hash_layers",
    "routed_scaling_factor": "route_scale",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "norm_eps",
    "num_nextn_predict_layers": "n_mtp_layers",
}
"""Our field (= hub name) -> name in the official inference/config.json."""

_DEFAULTS: dict[str, Any] = {"hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6}
"""Equal in every release and in the official ModelArgs; anything else must be written."""

_KINDS: dict[str, LayerKind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_LAYER_TYPES = {kind: name for name, kind in _KINDS.items()}

_CONSTANTS: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "score_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
    "scale_fmt": ("ue8m0",),
    "scale_dtype": ("fp8",),
}
"""Fields with one meaning in V4; another value is a model that this code is not."""

_WRITTEN_CONSTANTS = (
    "num_key_value_heads", "n_shared_experts", "scoring_func", "topk_method", "norm_topk_prob", "hidden_act",
    "tie_word_embeddings", "attention_bias",
)  # fmt: skip

_QUANTISATION: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "scale_fmt": ("ue8m0",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128],),
}

_HARMLESS = frozenset((
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "pad_token_id",
    "_name_or_path", "max_batch_size", "max_seq_len", "auto_map", "ep_size", "pretraining_tp",
    "aux_loss_alpha", "seq_aux",
))  # fmt: skip
"""Known and without effect here (`auto_map` names remote code, which is never run)."""

_ROPE_HARMLESS = frozenset(("type", "rope_type", "rope_theta", "partial_rotary_factor"))
_ROPE_ONE = ("mscale", "mscale_all_dim", "attention_factor")


def read_config(folder: Path) -> V4Config:
    """The configuration of a checkpoint folder: `config.json`, else the official `inference/config.json`.

    ConfigError when there is none, when it is no unambiguous JSON object, or as `config_from_dict` says.
    """
    path = folder / CONFIG
    if not path.exists() and (folder / "inference" / CONFIG).exists():
        path = folder / "inference" / CONFIG
    try:
        raw = read_object(path, _MAX_BYTES)
    except FileProblem as problem:
        raise config_error(str(path), [str(problem)]) from None
    return config_from_dict(raw, str(path))


def config_from_dict(raw: Mapping[str, Any], where: str = "config") -> V4Config:
    """The configuration in a parsed config.json of either naming.

    One ConfigError names every missing, unknown, unsupported and contradictory field. A hub configuration needs
    `compress_ratios` or `layer_types`: without them it is ambiguous (spec 1.2).
    """
    reader = _Reader(raw)
    official = any(name in raw for name in ("dim", "n_layers", "n_heads"))
    values = reader.sizes(_OFFICIAL_NAMES if official else {name: name for name in _OFFICIAL_NAMES})
    for name, allowed in _CONSTANTS.items():
        reader.constant(reader.left, name, allowed)
    reader.schedule(values)
    reader.tokens(values)
    if official:
        reader.official_only(values)
    else:
        reader.hub_only(values)
    reader.problems += [f"{name}: missing" for name, value in values.items() if value is _MISSING]
    values = {name: value for name, value in values.items() if value is not _MISSING}
    reader.problems += _unknown("", set(reader.left) - _HARMLESS)
    reader.problems += contradictions(values)
    if reader.problems:
        raise config_error(where, reader.problems)
    return V4Config(**values)


_MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()


class _Reader:
    """Takes known fields out of a raw configuration; what is left is unknown. Collects problems."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.left = dict(raw)
        self.problems: list[str] = []

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The fields of `_OFFICIAL_NAMES`; numbers that may be fractional become floats."""
        values = {ours: self.left.pop(theirs, _DEFAULTS.get(ours, _MISSING)) for ours, theirs in names.items()}
        for name in (
            "routed_scaling_factor",
            "swiglu_limit",
            "rope_theta",
            "compress_rope_theta",
            "hc_eps",
            "rms_norm_eps",
        ):
            values[name] = float(values[name]) if is_number(values[name]) else values[name]
        return values

    def constant(self, fields: dict[str, Any], name: str, allowed: tuple[object, ...], prefix: str = "") -> None:
        """Take a field that must have one of a few values, if it is there."""
        value = fields.pop(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            self.problems.append(found(prefix + name, value, " or ".join(map(repr, allowed))))

    def tokens(self, values: dict[str, Any]) -> None:
        """Token ids and the longest context; `eos_token_id` may be one id, several or null."""
        values["bos_token_id"] = self.left.pop("bos_token_id", 0)
        eos = self.left.pop("eos_token_id", 1)
        values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        values["max_position_embeddings"] = self.left.pop("max_position_embeddings", 1048576)

    def schedule(self, values: dict[str, Any]) -> None:
        """Layer kinds and ratios from `compress_ratios`, or from transformers' `layer_types` and `compress_rates`."""
        layers, mtp = values["num_hidden_layers"], values["num_nextn_predict_layers"]
        ratios = self.left.pop("compress_ratios", None)
        types = self.left.pop("layer_types", None)
        rates = self.left.pop("compress_rates", {})
        if ratios is None and types is None:
            self.problems.append(
                "compress_ratios: missing, and no layer_types either: the layers' attention is ambiguous"
            )
            return
        listed = ratios if ratios is not None else types
        if mtp is _MISSING and isinstance(listed, list) and is_int(layers):
            mtp = max(0, len(listed) - layers) if ratios is not None else 0
            values["num_nextn_predict_layers"] = mtp
        if types is not None:
            self._types(values, types, rates, mtp if is_int(mtp) and 0 <= mtp < 100 else 0)
        if ratios is not None:
            ratios = tuple(ratios) if isinstance(ratios, list) else ratios
            if types is not None and ratios != values["compress_ratios"]:
                self.problems.append(
                    found("compress_ratios", ratios, f"{values['compress_ratios']} as layer_types says")
                )
            values["compress_ratios"] = ratios
            if types is None:
                values["layer_kinds"] = kinds_of_ratios(ratios) if isinstance(ratios, tuple) else ()

    def _types(self, values: dict[str, Any], types: object, rates: object, mtp: int) -> None:
        if not isinstance(types, list) or not all(isinstance(name, str) and name in _KINDS for name in types):
            self.problems.append(found("layer_types", types, f"a list of {', '.join(_KINDS)}"))
            types = []
        elif len(types) != values["num_hidden_layers"]:
            self.problems.append(found("layer_types", f"{len(types)} entries", "num_hidden_layers entries"))
        if not isinstance(rates, dict) or not set(rates) <= set(_KINDS):
            self.problems.append(found("compress_rates", rates, f"an object with {', '.join(_KINDS)}"))
            rates = {}
        kinds = [_KINDS[name] for name in types]
        rate = {"swa": 0, "csa": rates.get(_LAYER_TYPES["csa"], 4), "hca": rates.get(_LAYER_TYPES["hca"], 128)}
        values["layer_kinds"] = tuple(kinds + ["swa"] * mtp)
        values["compress_ratios"] = tuple([rate[kind] for kind in kinds] + [0] * mtp)

    def hub_only(self, values: dict[str, Any]) -> None:
        """Fields that only the hub and transformers write."""
        self._hash_layers(values)
        quantisation = self.left.pop("quantization_config", None)
        expert_dtype = self.left.pop("expert_dtype", None)
        values["quantized"], values["expert_dtype"] = quantisation is not None, expert_dtype
        if isinstance(quantisation, dict):
            quantisation = dict(quantisation)
            values["expert_dtype"] = quantisation.pop("expert_dtype", expert_dtype)
            for name, allowed in _QUANTISATION.items():
                self.constant(quantisation, name, allowed, "quantization_config.")
            quantisation.pop("modules_to_not_convert", None)
            self.problems += _unknown("quantization_config.", quantisation)
        elif quantisation is not None:
            self.problems.append(found("quantization_config", quantisation, "an object"))
        self._rope(values)

    def _hash_layers(self, values: dict[str, Any]) -> None:
        types = self.left.pop("mlp_layer_types", None)
        if types is None:
            return
        layers = values["num_hidden_layers"]
        hashed = types.count("hash_moe") if isinstance(types, list) else 0
        if types != ["hash_moe"] * hashed + ["moe"] * ((layers if is_int(layers) else 0) - hashed):
            self.problems.append(found("mlp_layer_types", types, "num_hidden_layers entries, hash_moe first, then moe"))
        if values["num_hash_layers"] not in (_MISSING, hashed):
            self.problems.append(found("num_hash_layers", values["num_hash_layers"], f"{hashed} as in mlp_layer_types"))
        values["num_hash_layers"] = hashed

    def _rope(self, values: dict[str, Any]) -> None:
        """`rope_scaling` of the hub, or transformers' `rope_parameters` (one object, or main and compress)."""
        scaling, parameters = self.left.pop("rope_scaling", None), self.left.pop("rope_parameters", None)
        if scaling is not None and parameters is not None:
            self.problems.append("rope_scaling: found rope_parameters too, expected one of them")
        rope = parameters if scaling is None else scaling
        factor = self.left.pop("partial_rotary_factor", None)
        if rope is not None and not isinstance(rope, dict):
            self.problems.append(found("rope_scaling", rope, "an object or null"))
            rope = None
        if rope is not None and isinstance(rope.get("main"), dict) and isinstance(rope.get("compress"), dict):
            if self._rope_object("rope_parameters.main", rope["main"]) is not None:
                self.problems.append(found("rope_parameters.main", rope["main"], "rope_type default"))
            self._agree(values, "rope_theta", rope["main"].get("rope_theta"))
            rope = rope["compress"]
            self._agree(values, "compress_rope_theta", rope.get("rope_theta"))
        factor = factor if factor is not None or rope is None else rope.get("partial_rotary_factor")
        if is_number(factor) and is_int(values["head_dim"]):
            self._agree(values, "qk_rope_head_dim", int(values["head_dim"] * factor))
        values["rope_scaling"] = None if rope is None else self._rope_object("rope_scaling", rope)

    def _agree(self, values: dict[str, Any], name: str, nested: object) -> None:
        if values[name] is _MISSING and nested is not None:
            values[name] = float(nested) if name.endswith("theta") and is_number(nested) else nested  # type: ignore[arg-type]
        elif nested is not None and nested != values[name]:
            self.problems.append(found(name, values[name], f"{nested} as in the nested RoPE parameters"))

    def _rope_object(self, where: str, rope: dict[str, Any]) -> RopeScaling | None:
        left = {name: value for name, value in rope.items() if name not in _ROPE_HARMLESS}
        for name in _ROPE_ONE:
            if not (is_number(left.get(name, 1)) and left.pop(name, 1) == 1):
                self.problems.append(found(f"{where}.{name}", rope[name], "1: V4 scales no magnitudes"))
        kinds = {str(rope[name]) for name in ("type", "rope_type") if name in rope} or {"default"}
        taken = {name: left.pop(name) for name in RopeScaling.__dataclass_fields__ if name in left}
        self.problems += _unknown(f"{where}.", left)
        if kinds == {"yarn"}:
            missing = {"factor", "original_max_position_embeddings"} - taken.keys()
            self.problems += [f"{where}.{name}: missing" for name in sorted(missing)]
            return RopeScaling(**taken)
        if kinds != {"default"}:
            self.problems.append(found(f"{where}.type", " and ".join(sorted(kinds)), "yarn or default"))
        return None

    def official_only(self, values: dict[str, Any]) -> None:
        """Fields of the official ModelArgs; `original_seq_len` 0 switches YaRN off there."""
        names = {"factor": "rope_factor", "original_max_position_embeddings": "original_seq_len",
                 "beta_fast": "beta_fast", "beta_slow": "beta_slow"}  # fmt: skip
        taken = {ours: self.left.pop(theirs) for ours, theirs in names.items() if theirs in self.left}
        values["rope_scaling"] = RopeScaling(**taken) if taken.get("original_max_position_embeddings") else None
        if values["rope_scaling"] is not None and "factor" not in taken:
            self.problems.append("rope_factor: missing")
        dtype, expert_dtype = self.left.pop("dtype", "fp8"), self.left.pop("expert_dtype", None)
        if dtype not in ("fp8", "bf16"):
            self.problems.append(found("dtype", dtype, "fp8 or bf16"))
        values["quantized"] = dtype == "fp8" or expert_dtype is not None
        values["expert_dtype"] = expert_dtype or ("fp8" if dtype == "fp8" else None)


def _unknown(prefix: str, names: Iterable[str]) -> list[str]:
    """Unknown names come from outside: shortened, and without control characters."""
    return [f"{prefix}{ascii(name)[1:-1][:100]}: unknown field" for name in sorted(names)]


def config_to_dict(config: V4Config) -> dict[str, Any]:
    """The hub's config.json of a configuration; `config_from_dict` gives the same configuration back.

    Layers are written as `compress_ratios`; when these do not imply the kinds, as `layer_types` and `compress_rates`.
    ConfigError when neither can say it (several CSA ratios other than 4).
    """
    raw: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    raw |= {name: getattr(config, name) for name in _OFFICIAL_NAMES}
    raw |= {name: _CONSTANTS[name][0] for name in _WRITTEN_CONSTANTS}
    raw |= {"max_position_embeddings": config.max_position_embeddings, "bos_token_id": config.bos_token_id}
    eos = config.eos_token_ids
    raw["eos_token_id"] = list(eos) if len(eos) > 1 else config.eos_token_id
    raw["rope_scaling"] = None if config.rope_scaling is None else {"type": "yarn", **asdict(config.rope_scaling)}
    raw["torch_dtype"] = "bfloat16"
    raw |= _schedule_to_dict(config)
    if config.quantized:
        raw["quantization_config"] = {name: allowed[0] for name, allowed in _QUANTISATION.items()}
        raw["expert_dtype"] = config.expert_dtype
    return raw


def _schedule_to_dict(config: V4Config) -> dict[str, Any]:
    if kinds_of_ratios(config.compress_ratios) == config.layer_kinds:
        return {"compress_ratios": list(config.compress_ratios)}
    kept = config.num_hidden_layers
    ratios: dict[str, set[int]] = {}
    for kind, ratio in zip(config.layer_kinds[:kept], config.compress_ratios[:kept], strict=True):
        ratios.setdefault(kind, set()).add(ratio)
    several = sorted(kind for kind, used in ratios.items() if len(used) > 1)
    if several:
        line = found("compress_ratios", config.compress_ratios, f"one ratio for all {' and '.join(several)} layers")
        raise config_error("config.json", [line])
    rates = {_LAYER_TYPES["csa"]: min(ratios.get("csa", {4})), _LAYER_TYPES["hca"]: min(ratios.get("hca", {128}))}
    return {"layer_types": [_LAYER_TYPES[kind] for kind in config.layer_kinds[:kept]], "compress_rates": rates}
