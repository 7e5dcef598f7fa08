"""Small checkpoints of every format, made from `layout`."""

import dataclasses
import json
from pathlib import Path

import torch

from dsv4_ascend.checkpoint.config import V4Config, kinds_of_ratios
from dsv4_ascend.checkpoint.layout import FP8, INTEGER, layout
from dsv4_ascend.checkpoint.save import save_checkpoint

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}

TINY = {
    "vocab_size": 19, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
    "qk_rope_head_dim": 4, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 3, "n_routed_experts": 3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hash_layers": 1,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "rope_scaling": None, "num_nextn_predict_layers": 1,
    "hc_mult": 2, "quantized": True, "expert_dtype": "fp4",
}  # fmt: skip


def tiny_config(ratios=(0, 4, 16, 0), **changes) -> V4Config:
    """All three kinds of attention, hash and score routing, one MTP layer, FP4 experts;
    a few 10,000 parameters.
    """
    ratios = tuple(ratios)
    schedule = {
        "num_hidden_layers": len(ratios) - 1,
        "compress_ratios": ratios,
        "layer_kinds": kinds_of_ratios(ratios),
    }
    return V4Config(**(TINY | schedule | changes))


def random_tensors(
    config: V4Config, linear=FP8, expert="I8", other="BF16", seed=0
) -> dict[str, torch.Tensor]:
    """Random bytes of the wanted stored dtypes, under official names, scales included."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, entry in layout(config).items():
        dtype = expert if ".ffn.experts." in name else linear if entry.scale_name else other
        if entry.dtypes == INTEGER:
            tensors[name] = torch.randint(0, 3, entry.shape, generator=generator)
        elif dtype in TORCH:
            tensors[name] = torch.randn(entry.shape, generator=generator).to(TORCH[dtype])
        else:
            shape = entry.stored_shape(dtype)
            raw = torch.randint(0, 0x78, shape, generator=generator, dtype=torch.uint8)
            tensors[name] = raw.view(torch.float8_e4m3fn if dtype == FP8 else torch.int8)
            scale = torch.randint(
                120, 130, entry.scale_shape(dtype), generator=generator, dtype=torch.uint8
            )
            tensors[entry.scale_name] = scale.view(torch.float8_e8m0fnu)
    return tensors


def write_tiny(
    folder: Path, config: V4Config | None = None, shard_bytes=2**30, **dtypes
) -> dict[str, torch.Tensor]:
    """A checkpoint folder in the official layout; returns its tensors."""
    config = config or tiny_config()
    tensors = random_tensors(config, **dtypes)
    save_checkpoint(folder, config, tensors, shard_bytes=shard_bytes)
    return tensors


def read_raw(path: Path) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header, data: bytes) -> None:
    """A safetensors file with any header: a dict, or the very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def the_shard(folder: Path) -> Path:
    """The only shard of a folder, whose index is removed so that the shard may be changed."""
    (folder / "model.safetensors.index.json").unlink()
    return next(folder.glob("*.safetensors"))


def repack(path: Path, convert) -> None:
    """Rewrite a safetensors file;
    `convert(name, dtype, shape, raw)` gives each tensor's new (dtype, shape, raw).
    """
    header, data = read_raw(path)
    header.pop("__metadata__")
    changed, moved = {}, b""
    for name, entry in header.items():
        dtype, shape, raw = convert(
            name, entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]
        )
        changed[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(moved), len(moved) + len(raw)],
        }
        moved += raw
    write_raw(path, changed, moved)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


UNQUANTISED = dataclasses.replace(tiny_config(), quantized=False, expert_dtype=None)
