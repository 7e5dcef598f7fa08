"""From trained fp32 weights to a folder in the release's own formats,
with its held-out perplexity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from torch.nn.functional import cross_entropy

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.profile import A2A3_INT8, A2A3_W4A8, A5_MX, BF16, IDEAL, OFFICIAL, Profile
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_ascend.tiny.corpus import ngram_perplexities
from dsv4_ascend.tiny.training import TINY, stored_format
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.quant import quantize_weight_fp4, quantize_weight_fp8

SHIPPED = Path(__file__).parent / "checkpoint"
"""The small model that comes with the package."""

CARD = "perplexity.json"
WINDOW = 512
_WINDOWS_PER_CALL = 8


@dataclass(frozen=True)
class Perplexity:
    """Held-out perplexity per token, over `tokens` tokens in windows of 512. Lower is better."""

    tokens: int
    unigram: float
    bigram: float
    trained_fp32: float
    quantised_ideal: float
    quantised_official: float
    deployed_bf16: float
    deployed_a2a3_int8: float
    deployed_a2a3_w4a8: float
    deployed_a5_mx: float
    corpus_sha256: str


def release_tensors(trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantise fp32 parameters to the release's dtypes: FP4 experts,
    FP8 linears, E8M0 scales, BF16 and F32 rest.
    """
    released: dict[str, torch.Tensor] = {}
    quantise = {"fp4": quantize_weight_fp4, "fp8": quantize_weight_fp8}
    for name, tensor in trained.items():
        stored = stored_format(name, tensor.shape)
        if stored != "float":
            released[name], released[name.removesuffix("weight") + "scale"] = quantise[stored](
                tensor
            )
        elif tensor.is_floating_point() and not name.endswith(FP32_NAMES):
            released[name] = tensor.bfloat16()
        else:
            released[name] = tensor
    return released


@torch.inference_mode()
def perplexity(model: Model, stream: torch.Tensor) -> float:
    """Exp of the mean next-token loss over `stream` [N] in windows of 512.
    ArgumentError if it fills none.
    """
    if len(stream) <= WINDOW:
        raise ArgumentError(
            f"perplexity: found {len(stream)} tokens, expected at least {WINDOW + 1}"
        )
    windows = stream[: (len(stream) - 1) // WINDOW * WINDOW + 1]
    inputs, targets = windows[:-1].view(-1, WINDOW), windows[1:].view(-1, WINDOW)
    total = 0.0
    for rows, wanted in zip(
        inputs.split(_WINDOWS_PER_CALL), targets.split(_WINDOWS_PER_CALL), strict=True
    ):
        logits = model.forward(list(rows.unbind()), chunk=WINDOW)
        total += cross_entropy(logits, wanted.flatten(), reduction="sum").item()
    return math.exp(total / targets.numel())


def as_model(
    tensors: Mapping[str, torch.Tensor], profile: Profile, config: V4Config = TINY
) -> Model:
    """A model over these tensors in `profile`, without going through files."""
    device = torch.device("cpu")
    return Model(assign_all(Transformer(config, profile), tensors.items(), device), device=device)


def measure(
    trained: Mapping[str, torch.Tensor],
    train: torch.Tensor,
    held_out: torch.Tensor,
    digest: str,
    tokens: int,
    config: V4Config = TINY,
) -> Perplexity:
    """All perplexities of the small model on the first `tokens` held-out tokens,
    beside the counted baselines.
    """
    stream = held_out[: tokens // WINDOW * WINDOW + 1]
    unigram, bigram = ngram_perplexities(train, stream, config.vocab_size)
    released = release_tensors(trained)
    return Perplexity(
        tokens=len(stream) - 1,
        unigram=unigram,
        bigram=bigram,
        trained_fp32=perplexity(as_model(trained, IDEAL, config), stream),
        quantised_ideal=perplexity(as_model(released, IDEAL, config), stream),
        quantised_official=perplexity(as_model(released, OFFICIAL, config), stream),
        deployed_bf16=perplexity(as_model(released, BF16, config), stream),
        deployed_a2a3_int8=perplexity(as_model(released, A2A3_INT8, config), stream),
        deployed_a2a3_w4a8=perplexity(as_model(released, A2A3_W4A8, config), stream),
        deployed_a5_mx=perplexity(as_model(released, A5_MX, config), stream),
        corpus_sha256=digest,
    )


def write_release(
    folder: Path,
    trained: Mapping[str, torch.Tensor],
    tokenizer: tokenizers.Tokenizer,
    found: Perplexity,
    config: V4Config = TINY,
) -> None:
    """Write the official-layout folder: config.json, tokenizer.json, safetensors with index,
    and the perplexities.
    """
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        CARD: json.dumps(asdict(found), indent=2).encode() + b"\n",
    }
    save_checkpoint(folder, config, release_tensors(trained), files=files)
