"""Random checkpoints in the release's own formats: FP4 experts,
FP8 linears, E8M0 scales, BF16 and F32 rest (7.1).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tiny_networks import CONFIG, random_model

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import FP8, layout
from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_ascend.model.weights import official_tensors
from dsv4_backend.ops.quant import quantize_weight_fp4, quantize_weight_fp8

F32_ENDINGS = ("attn_sink", ".ape", "gate.bias", "_fn", "_base", "_scale")

QUANTISED = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_lora_rank=128,
    index_head_dim=64,
    moe_intermediate_size=128,
    sliding_window=16,
    index_topk=4,
    swiglu_limit=10.0,
    quantized=True,
    expert_dtype="fp4",
)


def write_quantised(folder: Path, config: V4Config = QUANTISED, seed: int = 0) -> Path:
    """A checkpoint folder of random weights, quantised as the release is."""
    values = dict(official_tensors(random_model(config, seed=seed).network))
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in layout(config).items():
        value = values[name]
        if entry.scale_name:
            quantise = quantize_weight_fp8 if entry.dtypes[0] == FP8 else quantize_weight_fp4
            tensors[name], tensors[entry.scale_name] = quantise(value)
        else:
            kept = not value.is_floating_point() or name.endswith(F32_ENDINGS)
            tensors[name] = value if kept else value.bfloat16()
    save_checkpoint(folder, config, tensors)
    return folder
