"""The random checkpoints behind tests/data/official,
bit for bit: official layout, shapes the official code accepts.

The order of draws is part of the recipe.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 640,
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_groups": 4, "o_lora_rank": 128,
    "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 256,
    "num_hash_layers": 1, "routed_scaling_factor": 2.5, "swiglu_limit": 10.0, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "num_key_value_heads": 1,
    "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "max_position_embeddings": 65536, "bos_token_id": 0, "eos_token_id": 1,
    "torch_dtype": "bfloat16", "compress_ratios": [0, 4, 128, 4, 0], "expert_dtype": "fp4",
    "rope_scaling": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "A": {},
    "C": {
        "hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 2, "head_dim": 128,
        "q_lora_rank": 128, "o_groups": 1, "o_lora_rank": 256, "sliding_window": 64,
        "index_n_heads": 4, "index_topk": 3, "compress_ratios": [128, 128, 4, 16, 4, 0],
        "num_hash_layers": 3, "moe_intermediate_size": 384, "n_routed_experts": 12,
        "num_experts_per_tok": 6, "rope_scaling": None, "swiglu_limit": 1.5,
    },
}  # fmt: skip
SEEDS = {"A": 100, "C": 102}


class _Recipe:
    """Draws tensors of a configuration in a fixed order."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config, self.generator = config, torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def scale(self, *shape: int, middle: int) -> torch.Tensor:
        exponents = torch.randint(middle - 1, middle + 2, shape, generator=self.generator)
        return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)

    def near_one(self, n: int) -> torch.Tensor:
        return (1 + 0.3 * self.normal(n)).bfloat16()

    def bf16(self, n: int, k: int, std: float = 1.0) -> torch.Tensor:
        return self.normal(n, k, std=std / math.sqrt(k)).bfloat16()

    def uniform(self, n: int, low: float) -> torch.Tensor:
        return torch.rand(n, generator=self.generator) + low

    def fp8(self, name: str, n: int, k: int) -> None:
        weight = (self.normal(n, k) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
        middle = round(math.log2(1 / (64 * math.sqrt(k))))
        self.tensors[f"{name}.weight"] = weight
        self.tensors[f"{name}.scale"] = self.scale(
            (n + 127) // 128, (k + 127) // 128, middle=middle
        )

    def fp4(self, name: str, n: int, k: int) -> None:
        codes = torch.randint(-128, 128, (n, k // 2), generator=self.generator).to(torch.int8)
        self.tensors[f"{name}.weight"] = codes
        self.tensors[f"{name}.scale"] = self.scale(
            n, k // 32, middle=round(math.log2(1 / (2.6 * math.sqrt(k))))
        )

    def hyper(self, prefix: str, mixes: int, scales: int, low: float) -> None:
        width = self.config["hc_mult"] * self.config["hidden_size"]
        self.tensors[f"{prefix}_fn"] = self.normal(mixes, width, std=1 / math.sqrt(width))
        self.tensors[f"{prefix}_base"] = self.normal(mixes, std=0.5)
        self.tensors[f"{prefix}_scale"] = self.uniform(scales, low)

    def compressor(self, prefix: str, head_dim: int, ratio: int) -> None:
        width, d = head_dim * (2 if ratio == 4 else 1), self.config["hidden_size"]
        self.tensors[f"{prefix}.ape"] = self.normal(ratio, width, std=0.5)
        self.tensors[f"{prefix}.norm.weight"] = self.near_one(head_dim)
        self.tensors[f"{prefix}.wkv.weight"] = self.bf16(width, d)
        self.tensors[f"{prefix}.wgate.weight"] = self.bf16(width, d)

    def attention(self, a: str, ratio: int) -> None:
        c, t = self.config, self.tensors
        d, q, dim, heads = (
            c["hidden_size"],
            c["q_lora_rank"],
            c["head_dim"],
            c["num_attention_heads"],
        )
        self.fp8(f"{a}.wq_a", q, d)
        t[f"{a}.q_norm.weight"] = self.near_one(q)
        self.fp8(f"{a}.wq_b", heads * dim, q)
        self.fp8(f"{a}.wkv", dim, d)
        t[f"{a}.kv_norm.weight"] = self.near_one(dim)
        self.fp8(f"{a}.wo_a", c["o_groups"] * c["o_lora_rank"], heads * dim // c["o_groups"])
        self.fp8(f"{a}.wo_b", d, c["o_groups"] * c["o_lora_rank"])
        t[f"{a}.attn_sink"] = self.normal(heads, std=2)
        if ratio:
            self.compressor(f"{a}.compressor", dim, ratio)
        if ratio == 4:
            self.compressor(f"{a}.indexer.compressor", c["index_head_dim"], 4)
            self.fp8(f"{a}.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], q)
            t[f"{a}.indexer.weights_proj.weight"] = self.bf16(c["index_n_heads"], d)

    def experts(self, f: str, hashed: bool) -> None:
        c, t = self.config, self.tensors
        d, m, count, k = (
            c["hidden_size"],
            c["moe_intermediate_size"],
            c["n_routed_experts"],
            c["num_experts_per_tok"],
        )
        t[f"{f}.gate.weight"] = self.bf16(count, d, std=1.5)
        if hashed:
            rows = [
                torch.randperm(count, generator=self.generator)[:k] for _ in range(c["vocab_size"])
            ]
            t[f"{f}.gate.tid2eid"] = torch.stack(rows)
        else:
            t[f"{f}.gate.bias"] = self.normal(count, std=0.2)
        shapes = {"w1": (m, d), "w3": (m, d), "w2": (d, m)}
        for e in range(count):
            for w, shape in shapes.items():
                self.fp4(f"{f}.experts.{e}.{w}", *shape)
        for w, shape in shapes.items():
            self.fp8(f"{f}.shared_experts.{w}", *shape)

    def block(self, p: str, ratio: int, hashed: bool) -> None:
        d, n = self.config["hidden_size"], self.config["hc_mult"]
        self.attention(f"{p}.attn", ratio)
        self.tensors[f"{p}.attn_norm.weight"] = self.near_one(d)
        self.tensors[f"{p}.ffn_norm.weight"] = self.near_one(d)
        self.experts(f"{p}.ffn", hashed)
        for site in ("attn", "ffn"):
            self.hyper(f"{p}.hc_{site}", n * (n + 2), 3, 0.3)

    def network(self) -> None:
        c, t, d, n = self.config, self.tensors, self.config["hidden_size"], self.config["hc_mult"]
        t["embed.weight"] = self.normal(c["vocab_size"], d).bfloat16()
        t["head.weight"] = self.bf16(c["vocab_size"], d, std=2)
        t["norm.weight"] = self.near_one(d)
        self.hyper("hc_head", n, 1, 0.5)
        layers = c["num_hidden_layers"]
        for i in range(layers):
            self.block(f"layers.{i}", c["compress_ratios"][i], i < c["num_hash_layers"])
        self.block("mtp.0", c["compress_ratios"][layers], False)
        self.hyper("mtp.0.hc_head", n, 1, 0.5)
        for name in ("e_proj", "h_proj"):
            self.fp8(f"mtp.0.{name}", d, d)
        for name in ("enorm", "hnorm", "norm"):
            t[f"mtp.0.{name}.weight"] = self.near_one(d)


def write_official(folder: Path, name: str) -> Path:
    """Checkpoint `name` ("A" or "C") in `folder`."""
    config = {key: value for key, value in (CONFIG | CHANGES[name]).items() if value is not None}
    recipe = _Recipe(config, SEEDS[name])
    recipe.network()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(recipe.tensors, folder / "model-00001-of-00001.safetensors")
    return folder
