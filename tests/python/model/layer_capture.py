"""What every layer of a model takes and makes over one sequence, chunk by chunk, as float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from layer_oracle import Given

from dsv4_ascend.model.attention import IndexerInput
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.paged import LayerCache, Paged
from dsv4_ascend.model.rows import Qkv
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Block
from dsv4_ascend.parity.arrays import to_array
from dsv4_backend.ops.embedding import embed_streams
from dsv4_backend.ops.indexer import IndexerCall, indexer_scores
from dsv4_backend.proofs.indexer_oracle import topk_indices
from dsv4_backend.proofs.numerics import Array, wide
from dsv4_backend.proofs.paging import Pages


@dataclass(frozen=True)
class Captured:
    """One layer over T tokens: streams in, ids, `parts` as layer_oracle.Layer has them.

    Of an MTP block `streams` are the main model's and `ids` the tokens that follow.
    """

    streams: Array
    ids: Array
    parts: dict[str, Array]
    given: Given


@dataclass
class _Steps:
    """One list per value of a layer, a tensor per step."""

    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def keep(self, name: str, value: torch.Tensor) -> None:
        self.values.setdefault(name, []).append(value)

    def passing(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.keep(name, value)
        return value

    def whole(self, name: str) -> Array:
        return np.concatenate([to_array(value) for value in self.values[name]])


def _listen(block: Block) -> _Steps:
    """Record queries, index scores and expert ids of a block from now on."""
    steps, attention = _Steps(), block.attn
    latents = attention.profile.latents

    def norm_rope(rows: Qkv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        q, kv, entries = latents.norm_rope(rows)
        return steps.passing("queries", q), kv, entries

    heard = replace(latents, norm_rope=norm_rope)
    attention.profile = replace(attention.profile, latents=heard)
    block.ffn.gate.register_forward_hook(lambda _m, _a, out: steps.keep("experts", out[1]))
    if attention.kind == "csa":
        scored = attention.indexer.scored

        def heard_scores(given: IndexerInput) -> IndexerCall:
            call = scored(given)
            steps.keep("scores", indexer_scores(*call))
            return call

        attention.indexer.scored = heard_scores
    return steps


def _run_step(
    model: Model,
    recorded: list[_Steps],
    step: Step,
    next_ids: torch.Tensor,
) -> None:
    network, batch = model.network, step.batch
    x = embed_streams(batch.input_ids, network.embed.weight, model.config.hc_mult)
    for block, layer_cache, steps in zip(network.layers, step.layers, recorded, strict=False):
        steps.keep("in", x)
        x = steps.passing("out", block.run(x, batch.input_ids, layer_cache, batch))
    for depth, steps in enumerate(recorded[len(network.layers) :]):
        steps.keep("in", x)
        x = steps.passing("out", network.run_mtp(depth, next_ids, x, *step))


@torch.inference_mode()
def capture(model: Model, ids: list[int], chunks: list[int]) -> list[Captured]:
    """All layers, MTP blocks last, over the first sum(chunks) of `ids`, one more than that."""
    total = sum(chunks)
    recorded = [_listen(block) for block in (*model.network.layers, *model.network.mtp)]
    cache = model.new_cache(max_sequences=1, max_tokens=total, max_step_tokens=total)
    sequence = cache.new_sequence()
    for size, end in zip(chunks, accumulate(chunks), strict=True):
        step = make_step(cache, [sequence], [ids[end - size : end]])
        _run_step(model, recorded, step, torch.tensor(ids[end - size + 1 : end + 1]))
    layers = make_step(cache, [sequence], [[]]).layers
    whole = np.array(ids[: total + 1])
    return [_captured(model, i, steps, layers[i], whole) for i, steps in enumerate(recorded)]


def _captured(
    model: Model,
    number: int,
    steps: _Steps,
    layer: LayerCache,
    ids: Array,
) -> Captured:
    config, total = model.config, len(ids) - 1
    ratio = config.compress_ratios[number]
    parts = {"streams": wide(steps.whole("out")), "queries": wide(steps.whole("queries"))}
    parts["window"] = _rows(layer.window, total)
    chosen = None
    if layer.entries is not None:
        parts["entries"] = _rows(layer.entries, total // ratio)
    if layer.index_keys is not None:
        parts["index keys"] = _rows(layer.index_keys, total // ratio)
        scores = parts["index scores"] = _scores(steps.values["scores"], total // ratio)
        chosen = topk_indices(scores, (np.arange(total) + 1) // ratio, config.index_topk)
    is_mtp = number >= config.num_hidden_layers
    own_ids = ids[1:] if is_mtp else ids[:-1]
    given = Given(steps.whole("experts"), parts, chosen)
    return Captured(wide(steps.whole("in")), own_ids, parts, given)


def _rows(part: Paged, count: int) -> Array:
    pages = Pages(to_array(part.tensor), to_array(part.table)[0])
    return wide(np.stack([pages[i] for i in range(count)]))


def _scores(steps: list[torch.Tensor], entries: int) -> Array:
    """Scores of all steps, as many columns each: -inf for entries that did not exist yet."""
    columns = [wide(to_array(step))[:, :entries] for step in steps]
    missing = [((0, 0), (0, entries - c.shape[1])) for c in columns]
    padded = [np.pad(c, m, constant_values=-np.inf) for c, m in zip(columns, missing, strict=True)]
    return np.concatenate(padded)
