"""Suite `transformers`: its eager attention beside sparse attention, from 1k to 16k tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv4_ascend.bench.sections import Section, quartiles, seconds
from dsv4_ascend.bench.timing import Timing, interleaved
from dsv4_ascend.integrations import transformers as integration

CONTEXTS = tuple(n << 10 for n in (1, 4, 16))
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "sliding_window": 128,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed")
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "max_position_embeddings": 1 << 20,
}
"""Small enough for eager's scores of 16k x 20k, and one layer of each kind."""


@dataclass(frozen=True)
class Run:
    """One context. what: "prefill" of all its tokens, or "decode" of one behind them; the timings
    are those of eager, of sparse(), and of sparse() with our experts. ratio: eager over sparse;
    growth: of sparse, to the shortest context.
    """

    what: str
    context: int
    eager: Timing
    sparse: Timing
    experts: Timing
    ratio: float
    growth: float


def transformers_models(
    rounds: int, sizes: dict[str, Any] | None = None, contexts: tuple[int, ...] = CONTEXTS
) -> list[Run]:
    """Random models of the same sizes, all contexts in one interleaved run."""
    torch.manual_seed(0)
    models = _models(sizes or SIZES)
    with torch.inference_mode():
        calls = dict(_calls(models, contexts))
        timings = interleaved(calls, rounds)
    found = []
    for what in ("prefill", "decode"):
        for context in contexts:
            eager, sparse, experts = (timings[what, context, name] for name in models)
            first = timings[what, contexts[0], "sparse"].median
            ratio, growth = eager.median / sparse.median, sparse.median / first
            found.append(Run(what, context, eager, sparse, experts, ratio, growth))
    return found


def _models(sizes: dict[str, Any]) -> dict[str, Any]:
    """Three models of the same weights."""
    integration.register()
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    eager = AutoModelForCausalLM.from_config(
        DeepseekV4Config(**sizes), attn_implementation="eager", dtype=torch.float32
    ).eval()
    models = {"eager": eager}
    for name, experts in ("sparse", None), ("experts", integration.NAME):
        config = copy.deepcopy(eager.config)
        with integration.sparse():
            models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        models[name].load_state_dict(eager.state_dict())
        if experts is not None:
            models[name].set_experts_implementation(experts)
    return models


def _calls(
    models: dict[str, Any], contexts: tuple[int, ...]
) -> Iterator[tuple[tuple[str, int, str], Callable[[], object]]]:
    vocabulary = models["eager"].config.vocab_size
    for context in contexts:
        ids = torch.randint(2, vocabulary, (1, context))
        cache = models["sparse"](input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for name, model in models.items():
            call = partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
            yield ("prefill", context, name), call
            own = copy.deepcopy(cache)
            yield ("decode", context, name), partial(model, ids[:, :1], past_key_values=own)


def section(rows: list[Run]) -> Section:
    """The table."""
    return Section(
        "transformers: eager attention beside sparse()",
        (
            "what",
            "context",
            "eager",
            "quartiles",
            "sparse",
            "quartiles",
            "with dsv4 experts",
            "eager / sparse",
            "growth of sparse",
        ),
        [
            [
                row.what,
                f"{row.context >> 10}k",
                seconds(row.eager.median),
                quartiles(row.eager),
                seconds(row.sparse.median),
                quartiles(row.sparse),
                seconds(row.experts.median),
                f"{row.ratio:.1f}",
                f"{row.growth:.1f}",
            ]
            for row in rows
        ],
        (
            "fp32, one layer of each kind, 256 wide, 4 heads of 128, window 128, 8 index heads, "
            "128 chosen entries, 8 experts: small enough for the scores that eager holds",
            "prefill: all tokens at once, without a cache; decode: one token behind them; the rest "
            "of the model (hyper-connections, routing, projections) is transformers' own",
            "growth: to the shortest context in the same run",
        ),
    )
