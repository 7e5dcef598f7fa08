"""Pairs of one transformers model: as it is (eager), and with sparse attention."""

from __future__ import annotations

import copy
import random

import oracle
import torch
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

from dsv4_ascend.integrations.transformers import sparse

LIMIT = 1e-4
"""Of logits in fp32, whose spread is about 1."""


def sparse_copy(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    with sparse():
        ours = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    ours.load_state_dict(model.state_dict())
    return ours.train(model.training)


def random_pair(seed: int) -> tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM]:
    """Of all kinds of layers, by seed; the window is at least 2: with 1 eager's cache keeps all."""
    shape = oracle.random_shape(seed)
    shape["sliding_window"] = max(2, shape["sliding_window"])
    model = oracle.make_model(shape, torch.initial_seed() + seed)
    model.generation_config.pad_token_id = 0
    return model, sparse_copy(model)


def padded(model: DeepseekV4ForCausalLM, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    ids = torch.randint(2, model.config.vocab_size, mask.shape)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def prompts_of(seed: int) -> list[int]:
    """Lengths of one to three prompts, of no ratio's multiples by intent."""
    pick = random.Random(seed)
    return [pick.randint(3, 60) for _ in range(1 + seed % 3)]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: from 0 on behind the padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def greedy(model: DeepseekV4ForCausalLM, new: int, **given: object) -> list[list[int]]:
    return model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=None).tolist()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    worst = (got - want).abs().max().item()
    assert worst <= LIMIT, f"logits differ by {worst:.2e}"
