"""Scaled-down checkpoints in the layouts of later releases: DSpark stages,
Vision-Exp, F32 scales.
"""

import dataclasses
import json
from pathlib import Path

import torch
from tiny_checkpoints import random_tensors, tiny_config, write_raw

from dsv4_ascend.checkpoint.config import DSpark, V4Config
from dsv4_ascend.checkpoint.config_file import config_to_dict

SIZES = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
}
PLAIN = tiny_config(**SIZES)
RANK, NOISE, BLOCK = 16, 17, 5
DRAFTER = DSpark(RANK, 3, (0, 1, 2), BLOCK, NOISE)
DSPARK = PLAIN.with_drafts(3, DRAFTER)
FIELDS = {
    "dspark_block_size": BLOCK, "dspark_markov_rank": RANK, "dspark_noise_token_id": NOISE,
    "dspark_target_layer_ids": [0, 1, 2],
}  # fmt: skip
F32_NAMES = ("attn_sink", ".ape", "gate.bias", "_fn", "_base", "_scale")


def dspark_tensors() -> dict[str, torch.Tensor]:
    """The tensors of a release by rule of its names (spec/v41.md 1.1),
    not by our layout: blocks, then the extras.
    """
    blocks = random_tensors(PLAIN.with_drafts(3))
    parts = (".e_proj.", ".h_proj.", ".enorm.", ".hnorm.", ".norm.", ".hc_head_")
    tensors = {name: tensor for name, tensor in blocks.items() if not _only_in_mtp(name, parts)}
    d, vocab = PLAIN.hidden_size, PLAIN.vocab_size
    tensors["mtp.0.main_proj.weight"] = torch.zeros(d, 3 * d).to(torch.float8_e4m3fn)
    tensors["mtp.0.main_proj.scale"] = torch.full((1, 3), 127, dtype=torch.uint8).view(
        torch.float8_e8m0fnu
    )
    tensors["mtp.0.main_norm.weight"] = torch.ones(d).bfloat16()
    tensors |= {
        name: blocks[name] for name in ("mtp.2.norm.weight", *(f"mtp.2.hc_head_{p}" for p in _HEAD))
    }
    tensors |= {
        f"mtp.2.markov_head.markov_{w}.weight": torch.zeros(vocab, RANK).bfloat16()
        for w in ("w1", "w2")
    }
    tensors["mtp.2.confidence_head.proj.weight"] = torch.zeros(1, d + RANK).bfloat16()
    return tensors


_HEAD = ("fn", "base", "scale")


def _only_in_mtp(name: str, parts: tuple[str, ...]) -> bool:
    return (
        name.startswith("mtp.")
        and name.count(".") < 4
        and any(part in f".{name}"[4:] for part in parts)
    )


def vision_tensors() -> dict[str, torch.Tensor]:
    """What Vision-Exp adds: tower, aligner, image tokens,
    a second bias in every gate, one in the hash layer's.
    """
    d, experts = PLAIN.hidden_size, PLAIN.n_routed_experts
    gates = [f"layers.{layer}" for layer in range(PLAIN.num_hidden_layers)] + ["mtp.0"]
    tensors = {f"{gate}.ffn.gate.bias_vl": torch.zeros(experts) for gate in gates}
    tensors["layers.0.ffn.gate.bias"] = torch.zeros(experts)
    tensors["vision.blocks.0.attn.wqkv.weight"] = torch.zeros(24, 8).bfloat16()
    tensors["vision.norm.weight"] = torch.zeros(8).bfloat16()
    tensors["aligner.w1.weight"] = torch.zeros(8, 8).bfloat16()
    return tensors | {
        f"image_{kind}": torch.zeros(d).bfloat16() for kind in ("start", "end", "newline", "pad")
    }


def put(
    folder: Path, raw: dict, tensors: dict[str, torch.Tensor], file: str = "model.safetensors"
) -> Path:
    """A folder of one safetensors file and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw_bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape, span = list(tensor.shape), [len(data), len(data) + len(raw_bytes)]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": span}
        data += raw_bytes
    write_raw(folder / file, header, data)
    return folder


_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int64: "I64",
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int32: "I32", torch.uint32: "U32",
}  # fmt: skip


def hub(config: V4Config = PLAIN, **changes) -> dict:
    """The hub's config.json with changed fields."""
    return config_to_dict(config) | changes


UNQUANTISED = dataclasses.replace(PLAIN, quantized=False, expert_dtype=None)
