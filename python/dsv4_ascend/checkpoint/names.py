"""Tensor names: official <-> transformers (spec/v4.md 7.3).

transformers' `save_pretrained` converts back half-way: `head.weight` but
`model.embed_tokens.weight`, official layer names under `model.`, and `attn.norm` for the key norm.
Module names, that mixture and official names are all read.
"""

from __future__ import annotations

import re

_TOP = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}

_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"attn_hc.{part}": f"hc_attn_{part}" for part in ("fn", "base", "scale")},
    **{f"ffn_hc.{part}": f"hc_ffn_{part}" for part in ("fn", "base", "scale")},
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "mlp.gate": "ffn.gate",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
}

STACKED = {
    "mlp.experts.gate_up_proj": "ffn.experts.w13.weight",
    "mlp.experts.down_proj": "ffn.experts.w2.weight",
    **{
        f"mlp.experts.gate_up_proj{ending}": "ffn.experts.w13.scale"
        for ending in ("_scale_inv", "_scale")
    },
    **{
        f"mlp.experts.down_proj{ending}": "ffn.experts.w2.scale"
        for ending in ("_scale_inv", "_scale")
    },
}
"""transformers keeps all experts of a layer in one tensor;
our name for it has no expert number (`expert_parts`).
"""

_WRITTEN_ONLY = {"attn.norm": "attn.kv_norm"}
"""What `save_pretrained` makes of names that its reverse conversion cannot tell apart."""

_TO_OFFICIAL_BLOCK = _BLOCK | _WRITTEN_ONLY
_TO_MODULE_TOP = {official: module for module, official in _TOP.items()}
_TO_MODULE_BLOCK = {official: module for module, official in _BLOCK.items()}
_PREFIX = re.compile(r"((?:layers|mtp)\.\d+\.)?(.*)", re.DOTALL)
_STACKED_NAME = re.compile(r"(.*\.ffn\.experts)\.(w13|w2)\.(weight|scale)")
_SCALE = re.compile(r"\.weight_scale(_inv)?\Z")
"""What FP8 quantisers call a `.scale`; both multiply, despite "inv"."""
_EXPERT_NAME = re.compile(r"(.*)\.ffn\.experts\.\d+\.(w1|w2|w3)\.(weight|scale)")


def to_official(stored: str) -> str:
    """The official name of a stored tensor, whichever naming it has.

    Stacked experts become `...ffn.experts.w13.weight` and `...w2.weight` (see `expert_parts`). A
    name that no table knows comes back without the `model.` prefix.
    """
    if (
        stored.startswith(("layers.", "mtp."))
        and ".ffn.experts." in stored
        and stored.endswith((".weight", ".scale"))
    ):
        return stored  # nearly all names of a release
    prefix, rest = _split(stored.removeprefix("model."))
    if prefix and rest in STACKED:
        return prefix + STACKED[rest]
    rest = _SCALE.sub(".scale", rest)
    stem, suffix = _suffix(rest)
    table = _TO_OFFICIAL_BLOCK if prefix else _TOP
    return prefix + table.get(rest, table.get(stem, stem) + suffix)


def to_transformers(official: str) -> str:
    """The name in `DeepseekV4ForCausalLM.state_dict()` that holds an official tensor;
    experts are stacked there.
    """
    expert = _EXPERT_NAME.fullmatch(official)
    if expert:
        block, part, suffix = expert.groups()
        stacked = "down_proj" if part == "w2" else "gate_up_proj"
        return f"model.{block}.mlp.experts.{stacked}{'_scale_inv' if suffix == 'scale' else ''}"
    prefix, rest = _split(official)
    table = _TO_MODULE_BLOCK if prefix else _TO_MODULE_TOP
    stem, suffix = _suffix(rest)
    if rest not in table:
        rest = table.get(stem, stem) + (".weight_scale_inv" if suffix == ".scale" else suffix)
    else:
        rest = table[rest]
    return rest if rest.startswith("lm_head") else f"model.{prefix}{rest}"


def expert_parts(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(`...ffn.experts`, the parts in row order, "weight" or "scale") of a stacked name,
    None for any other.
    """
    match = _STACKED_NAME.fullmatch(name) if ".experts.w" in name else None
    if match is None:
        return None
    prefix, stack, suffix = match.groups()
    return prefix, ("w1", "w3") if stack == "w13" else ("w2",), suffix


def _split(name: str) -> tuple[str, str]:
    match = _PREFIX.fullmatch(name)
    assert match is not None
    return match.group(1) or "", match.group(2)


def _suffix(name: str) -> tuple[str, str]:
    for suffix in (".weight", ".scale"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
