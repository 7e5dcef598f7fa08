"""Training of the small model: real architecture,
references' autograd, quantisation-aware at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dsv4_ascend.checkpoint.config import RopeScaling, V4Config
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Gate, Transformer
from dsv4_ascend.model.weights import assign, official_tensors
from dsv4_ascend.tiny.alignment import align_indexers
from dsv4_backend.ops.quant import (
    dequantize_fp4,
    dequantize_fp8,
    quantize_weight_fp4,
    quantize_weight_fp8,
)

TINY = V4Config(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    sliding_window=32,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    compress_ratios=(0, 4, 128, 4, 0),
    layer_kinds=("swa", "csa", "hca", "csa", "swa"),
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(),
    num_nextn_predict_layers=1,
    max_position_embeddings=1048576,
    quantized=True,
    expert_dtype="fp4",
)

_FLOAT_MATRICES = (
    "embed.",
    "head.",
    "gate.",
    "weights_proj",
    "compressor.",
    "hc_",
    "attn_sink",
    "norm",
    "tid2eid",
)


@dataclass(frozen=True)
class Recipe:
    """`steps` of `batch` sequences of `length` tokens;
    weights count as quantised from that share of the steps on.
    """

    steps: int = 1300
    batch: int = 4
    length: int = 512
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    quantise_from: float = 0.85
    mtp_weight: float = 0.3
    balance_rate: float = 2e-3
    seed: int = 0


def stored_format(name: str, shape: torch.Size) -> str:
    """How the release stores a parameter,
    or a projection of all experts: "fp4", "fp8" or "float" (spec/v4.md 7.1).
    """
    if ".ffn.experts." in name:
        return "fp4"
    return "float" if len(shape) != 2 or any(part in name for part in _FLOAT_MATRICES) else "fp8"


class _Quantise(torch.autograd.Function):
    """Value of the stored weight, gradient of the identity."""

    @staticmethod
    def forward(ctx: object, weight: torch.Tensor, stored: str) -> torch.Tensor:
        if stored == "fp4":
            return dequantize_fp4(*quantize_weight_fp4(weight))
        return dequantize_fp8(*quantize_weight_fp8(weight))

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def initialise(network: Transformer, seed: int) -> None:
    """Give every parameter its starting value, in the order of names, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * len(network.layers))
    for name, parameter in list(official_tensors(network)):
        value = _initial(name, parameter, network.config, generator)
        if name.endswith(("wo_b.weight", "w2.weight")):
            value /= depth
        assign(network, name, value)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _initial(
    name: str, parameter: torch.Tensor, config: V4Config, generator: torch.Generator
) -> torch.Tensor:
    shape = parameter.shape
    if name.endswith("tid2eid"):
        return (
            torch.rand(shape[0], config.n_routed_experts, generator=generator)
            .argsort(1)[:, : shape[1]]
            .contiguous()
        )
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("_scale"):
        return torch.full(shape, 0.1)
    if name.endswith("_base"):
        base = torch.zeros(shape)
        if shape[0] > (n := config.hc_mult):
            base[2 * n :] = 2 * torch.eye(n).flatten()
        return base
    if name.endswith((".bias", "attn_sink", "ape")):
        return torch.zeros(shape)
    std = 0.3 if name == "embed.weight" else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * std


class LossModel(nn.Module):
    """The network under its training loss: next token,
    the MTP block's token after next, indexer alignment.
    """

    def __init__(self, network: Transformer, mtp_weight: float) -> None:
        super().__init__()
        self.network, self.mtp_weight = network, mtp_weight
        self.indexers = align_indexers(network)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, L + 2] -> (next-token loss, training loss), both means in nats."""
        length = tokens.shape[1] - 2
        step = step_inputs(self.network.config, tokens[:, :length])
        streams = self.network.run_layers(*step)
        next_ids = tokens[:, 1 : length + 1].flatten()
        loss = cross_entropy(self.network.logits(streams), next_ids)
        drafted = self.network.run_mtp(0, next_ids, streams, *step)
        mtp = cross_entropy(self.network.logits(drafted, depth=0), tokens[:, 2:].flatten())
        alignment = torch.stack([indexer.loss for indexer in self.indexers]).sum()
        return loss, loss + self.mtp_weight * mtp + alignment


def step_inputs(config: V4Config, tokens: torch.Tensor) -> Step:
    """In a fresh cache, one prefill of all rows of `tokens` [B, L]."""
    count, length = tokens.shape
    cache = PagedCache(
        config,
        max_sequences=count,
        max_tokens=length,
        max_step_tokens=length,
        dtype=torch.float32,
        block_size=16,
    )
    return make_step(cache, [cache.new_sequence() for _ in range(count)], list(tokens))


def _crops(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    while True:
        starts = torch.randint(
            0, len(stream) - recipe.length - 2, (recipe.batch,), generator=generator
        )
        yield torch.stack([stream[s : s + recipe.length + 2] for s in starts])


class _Balance:
    """Keeps expert loads even through the selection bias alone, without a loss term (5.1)."""

    def __init__(self, network: Transformer, rate: float) -> None:
        self.rate = rate
        self.loads: dict[Gate, torch.Tensor] = {}
        for module in network.modules():
            if isinstance(module, Gate) and not module.hashed:
                module.register_forward_hook(self._count)

    def _count(self, gate: nn.Module, _: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        assert isinstance(gate, Gate)
        self.loads[gate] = torch.bincount(
            output[1].flatten().long(), minlength=gate.weight.shape[0]
        ).float()

    @torch.no_grad()
    def step(self) -> None:
        for gate, load in self.loads.items():
            gate.bias.add_(torch.sign(load.mean() - load), alpha=self.rate)


def train(
    network: Transformer,
    stream: torch.Tensor,
    recipe: Recipe,
    report: Callable[[int, float, float], None],
) -> None:
    """Train in place. report(step, loss in nats, seconds) is called every step."""
    initialise(network, recipe.seed)
    model, balance = LossModel(network, recipe.mtp_weight), _Balance(network, recipe.balance_rate)
    trained = {
        n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith("gate.bias")
    }
    matrices = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-9, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, recipe))
    start = time.monotonic()
    for step, tokens in zip(range(recipe.steps), _crops(stream, recipe), strict=False):
        parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        if step >= recipe.quantise_from * recipe.steps:
            parameters = {n: fake_quantised(n, p) for n, p in parameters.items()}
        loss, total = torch.func.functional_call(model, parameters, (tokens,))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        balance.step()
        report(step, float(loss.detach()), time.monotonic() - start)


def fake_quantised(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter as the release will store it, differentiable straight through."""
    stored = stored_format(name, parameter.shape)
    return parameter if stored == "float" else _Quantise.apply(parameter, stored)  # type: ignore[no-untyped-call]


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
