"""Transformers' models on npu and on the CPU: prefill,
64 cached decode steps, gradients, one optimiser step.
"""

import copy
import sys

import torch
import torch_npu  # noqa: F401
from seeds import seed
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

torch.set_num_threads(1)
common = dict(
    vocab_size=97,
    hidden_size=32,
    num_attention_heads=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
MODELS = {
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common,
            intermediate_size=48,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            max_position_embeddings=128,
        )
    ),
    "deepseek-v4": lambda: DeepseekV4ForCausalLM(
        DeepseekV4Config(
            **common,
            num_hidden_layers=3,
            head_dim=16,
            q_lora_rank=16,
            o_lora_rank=8,
            o_groups=2,
            n_routed_experts=4,
            n_shared_experts=1,
            max_position_embeddings=512,
            sliding_window=16,
            index_n_heads=2,
            index_head_dim=8,
            index_topk=4,
        )
    ),
}


def distance(a, b):
    return (a - b.cpu()).abs().max().item()


for name, make in MODELS.items():
    torch.manual_seed(seed(name))
    host = make().eval().float()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    npu = copy.deepcopy(host).to("npu")
    ids = torch.randint(0, 97, (2, 37))
    with torch.no_grad():
        a, b = host(ids, use_cache=True), npu(ids.npu(), use_cache=True)
        worst = distance(a.logits, b.logits)
        for _ in range(64):
            token = a.logits[:, -1:].argmax(-1)
            a = host(token, past_key_values=a.past_key_values, use_cache=True)
            b = npu(token.npu(), past_key_values=b.past_key_values, use_cache=True)
            worst = max(worst, distance(a.logits, b.logits))
    host.train(), npu.train()
    host(ids, labels=ids).loss.backward()
    npu(ids.npu(), labels=ids.npu()).loss.backward()
    pairs = [
        (p, q)
        for p, q in zip(host.parameters(), npu.parameters(), strict=True)
        if p.grad is not None
    ]
    gradient = max(distance(p.grad, q.grad) for p, q in pairs)
    for model in (host, npu):
        torch.optim.AdamW(model.parameters(), 1e-3).step()
    step = max(distance(p, q) for p, q in pairs)
    print(
        f"{name}: logits {worst:.2g}, {len(pairs)} gradients {gradient:.2g}, parameters after one "
        f"step {step:.2g}"
    )
    if not (worst <= 1e-5 and gradient <= 1e-5 and step <= 1e-5):
        sys.exit(1)
print("models good")
