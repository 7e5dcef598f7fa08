"""Small random networks with every part of the architecture, for tests that need no checkpoint."""

from __future__ import annotations

import torch

from dsv4_ascend.checkpoint.config import RopeScaling, V4Config
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.profile import IDEAL, OFFICIAL
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all, official_tensors

CONFIG = V4Config(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=16,
    sliding_window=8,
    index_n_heads=32,
    index_head_dim=32,
    index_topk=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    swiglu_limit=2.0,
    compress_ratios=(0, 4, 16, 0),
    layer_kinds=("swa", "csa", "hca", "swa"),
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(original_max_position_embeddings=64),
    num_nextn_predict_layers=1,
)


def random_model(
    config: V4Config = CONFIG, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    """A model whose parameters are all non-trivial; logits of size about 3."""
    generator = torch.Generator().manual_seed(seed)
    network = Transformer(config, OFFICIAL if dtype == torch.bfloat16 else IDEAL)
    device = torch.device("cpu")
    tensors = [(name, _value(name, p, config, generator)) for name, p in official_tensors(network)]
    return Model(assign_all(network, tensors, device), device=device)


def _value(
    name: str, parameter: torch.Tensor, config: V4Config, generator: torch.Generator
) -> torch.Tensor:
    shape = parameter.shape
    if name.endswith("tid2eid"):
        scores = torch.rand(shape[0], config.n_routed_experts, generator=generator)
        return scores.argsort(1)[:, : shape[1]].contiguous()
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith(("attn_sink", "ape", ".bias", "_base", "_scale")):
        return 0.5 * noise
    return noise if name == "embed.weight" else 1.5 * noise * shape[-1] ** -0.5
