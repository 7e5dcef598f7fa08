"""transformers as an independent implementation: random DeepseekV4ForCausalLM models,
no parameter trivial.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

# Spec 15.1 T1: the clamp acts, 32 index heads keep exact-zero ties away, all three attention kinds,
# two hash layers.
T1 = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "sliding_window": 8,
    "kinds": ["swa", "csa", "hca", "csa", "swa"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "hash_layers": 2,
    "swiglu_limit": 0.5,
    "routed_scaling_factor": 1.5,
    "hc_mult": 4,
    "yarn_original": 64,
}

# Spec 15.1 T2: the release's head geometry.
T2 = {
    **T1,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 32,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 256,
    "sliding_window": 128,
    "kinds": ["swa", "csa", "hca"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "hash_layers": 1,
    "swiglu_limit": 10.0,
    "yarn_original": 65536,
}


def random_shape(seed: int) -> dict:
    """A shape of other head counts, ratios, windows, top-k, expert and stream counts."""
    pick = random.Random(seed)
    groups = pick.choice([1, 2, 4])
    experts = pick.choice([4, 8, 16])
    kinds = ["swa", "csa", "hca", *pick.choices(["swa", "csa", "hca"], k=pick.randint(0, 3))]
    pick.shuffle(kinds)
    rope_dim = pick.choice([4, 8, 16])
    return {
        "vocab_size": pick.choice([61, 128]),
        "hidden_size": pick.choice([32, 48, 64]),
        "num_hidden_layers": len(kinds),
        "num_attention_heads": groups * pick.choice([1, 2, 3]),
        "head_dim": rope_dim + pick.choice([8, 16, 24]),
        "qk_rope_head_dim": rope_dim,
        "q_lora_rank": pick.choice([16, 24]),
        "o_groups": groups,
        "o_lora_rank": pick.choice([8, 16]),
        "index_n_heads": 32,
        "index_head_dim": rope_dim + pick.choice([0, 8, 16]),
        "index_topk": pick.choice([1, 3, 8, 100]),
        "n_routed_experts": experts,
        "num_experts_per_tok": pick.randint(1, min(6, experts)),
        "moe_intermediate_size": pick.choice([16, 40]),
        "sliding_window": pick.choice([1, 5, 8, 16]),
        "kinds": kinds,
        "compress_rates": {
            "compressed_sparse_attention": pick.choice([2, 3, 4]),
            "heavily_compressed_attention": pick.choice([5, 8, 16]),
        },
        "hash_layers": pick.randint(0, len(kinds)),
        "swiglu_limit": pick.choice([0.5, 2.0, 10.0]),
        "routed_scaling_factor": pick.choice([1.0, 1.5, 2.5]),
        "hc_mult": pick.choice([2, 3, 4]),
        "yarn_original": pick.choice([32, 64, 4096]),
    }


_KINDS = {
    "swa": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def make_config(shape: dict) -> DeepseekV4Config:
    """A transformers config from a shape such as T1."""
    given = dict(shape)
    kinds, hashed, original = (
        given.pop("kinds"),
        given.pop("hash_layers"),
        given.pop("yarn_original"),
    )
    layers = given["num_hidden_layers"]
    return DeepseekV4Config(
        **given,
        layer_types=[_KINDS[k] for k in kinds],
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": original,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        max_position_embeddings=original * 16,
        attn_implementation="eager",
    )


@torch.no_grad()
def make_model(shape: dict, seed: int = 0) -> DeepseekV4ForCausalLM:
    """A random fp32 model: weights of useful size, norms around 1,
    non-zero sinks, ape, biases and hash tables.
    """
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(make_config(shape)).float().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        if name.endswith("tid2eid"):
            rows = torch.rand(tensor.shape[0], shape["n_routed_experts"]).argsort(1)
            tensor.copy_(rows[:, : tensor.shape[1]])
        elif "norm" in name:
            tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
        elif name.endswith(
            ("sinks", "position_bias", "e_score_correction_bias", ".base", "hc_base")
        ):
            tensor.copy_(0.5 * torch.randn_like(tensor))
        elif name.endswith((".scale", "hc_scale")):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif "embed_tokens" in name:
            tensor.copy_(torch.randn_like(tensor))
        else:
            tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


def save(model: DeepseekV4ForCausalLM, folder: Path) -> Path:
    """Write the folder that users get from save_pretrained."""
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: DeepseekV4ForCausalLM, ids: list[int]) -> torch.Tensor:
    """Reference logits fp32 [T, V] of one sequence."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()
