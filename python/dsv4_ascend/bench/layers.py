"""Suite `layer`: one whole layer of each kind at Flash dimensions, random weights in the official
formats: one token behind contexts, and a chunk of a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from dsv4_ascend.bench.products import bf16, fp4_weight, fp8_weight
from dsv4_ascend.bench.sections import Section, quartiles, rate, seconds
from dsv4_ascend.bench.timing import Timing, interleaved
from dsv4_ascend.bench.work import size_of
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.profile import PROFILES
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Block, Transformer
from dsv4_ascend.weights.experts import ExpertStack
from dsv4_ascend.weights.formats import Fp4Experts, Fp8
from dsv4_ascend.weights.linear import Linear

CONTEXTS = tuple(n << 10 for n in (1, 64, 1024))
PROMPT = 2048
_WORDS = 512
_RATIOS = {"swa": 0, "csa": 4, "hca": 128}
_FP8 = frozenset(("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3"))
"""Last names of matrices that releases keep in FP8; those of compressors are bf16."""
_ALL = "all layers"


@dataclass(frozen=True)
class Row:
    """A layer, or the sum of all that a release has. weights: bytes that a run reads of them;
    growth: of a token's time, to the shortest context in the same run.
    """

    layer: str
    context: int
    tokens: int
    weights: int
    timing: Timing
    growth: float


class _Layers:
    """A network of one layer per kind, and one sequence in a cache of random rows."""

    def __init__(self, release: V4Config, experts: int, longest: int, prompt: int) -> None:
        few = replace(release, vocab_size=_WORDS, n_routed_experts=experts, num_hash_layers=0)
        config = few.with_layers(tuple(_RATIOS.values()))
        self.config, self.profile = config, PROFILES["official"]
        self.network = Transformer(config, self.profile)
        _fill(self.network)
        self.cache = PagedCache(
            self.network.share,
            max_sequences=1,
            max_tokens=longest,
            max_step_tokens=prompt,
            dtype=self.profile.dtype,
        )
        for pools in self.cache.pools:
            for pool in pools.values():
                pool.pages.uniform_(-1, 1)
        self.sequence = self.cache.new_sequence()

    def step(self, tokens: int, context: int) -> Step:
        """The last `tokens` of `context` tokens; contexts only grow."""
        most = self.cache.max_step_tokens
        while (missing := context - tokens - self.sequence.length) > 0:
            self.cache.grow(self.sequence, min(missing, most))
        return make_step(self.cache, [self.sequence], [torch.randint(_WORDS, (tokens,))])

    def run(self, layer: int, step: Step) -> Callable[[], torch.Tensor]:
        """One layer of a step; what layers share of a step is made by the first call."""
        block, (batch, caches) = self.network.layers[layer], step
        assert isinstance(block, Block)
        x = bf16(len(batch.input_ids), self.config.hc_mult, self.config.hidden_size)

        def call() -> torch.Tensor:
            with batch.running():
                return block.run(x, batch.input_ids, caches[layer], batch)

        return call

    def read(self, layer: int, tokens: int) -> int:
        """Bytes of the layer's weights that so many tokens read: of experts as many as they can
        choose.
        """
        block, of = self.network.layers[layer], self.config
        stacks = [m for m in block.modules() if isinstance(m, ExpertStack)]
        experts = sum(size_of(*stack.parameters()) for stack in stacks)
        chosen = min(of.n_routed_experts, tokens * of.num_experts_per_tok)
        rest = size_of(*block.parameters()) - experts
        return rest + experts * chosen // of.n_routed_experts


def _fill(network: Transformer) -> None:
    """Put random weights into every place, FP8 and FP4 where releases have them."""
    for path, module in network.named_modules():
        if isinstance(module, ExpertStack):
            module.keep(Fp4Experts(*fp4_weight(*module.weight.shape)))
        elif isinstance(module, Linear) and _is_fp8(path):
            module.keep(Fp8(*fp8_weight(*module.weight.shape)))
    for name, empty in list(network.named_parameters()):
        if empty.is_meta:
            path, _, leaf = name.rpartition(".")
            value = bf16(*empty.shape) / max(1, empty.shape[-1]) ** 0.5
            value = value.float() if name.endswith(FP32_NAMES) else value
            place = nn.Parameter(value, requires_grad=False)
            setattr(network.get_submodule(path), leaf, place)


def _is_fp8(path: str) -> bool:
    return path.rpartition(".")[2] in _FP8 and ".compressor." not in path


def layers(
    rounds: int,
    experts: int,
    release: V4Config | None = None,
    contexts: tuple[int, ...] = CONTEXTS,
    prompt: int = PROMPT,
) -> list[Row]:
    """One token behind every context, which rise, then a prompt's chunk behind none: all in one
    interleaved run. release: Flash if None, whose layers have so many experts here.
    """
    release = release or V4Config.flash()
    torch.manual_seed(0)
    with torch.inference_mode():
        all_ = _Layers(release, experts, max(*contexts, prompt), prompt)
        chunk = all_.step(prompt, prompt)
        all_.cache.free(all_.sequence)
        shapes = [(1, context, all_.step(1, context)) for context in contexts]
        shapes.append((prompt, prompt, chunk))
        calls = {
            (kind, tokens, context): all_.run(i, step)
            for tokens, context, step in shapes
            for i, kind in enumerate(_RATIOS)
        }
        timings = interleaved(calls, rounds)
    rows = []
    for tokens, context, _ in shapes:
        first = contexts[0] if tokens == 1 else context
        own = partial(_row, timings, tokens, context, first)
        kinds = [own(kind, all_.read(i, tokens)) for i, kind in enumerate(_RATIOS)]
        rows += [*kinds, _sum(release, kinds)]
    return rows


def _row(
    timings: Mapping[tuple[str, int, int], Timing],
    tokens: int,
    context: int,
    first: int,
    kind: str,
    weights: int,
) -> Row:
    timing, shortest = timings[kind, tokens, context], timings[kind, tokens, first]
    return Row(kind, context, tokens, weights, timing, timing.median / shortest.median)


def _sum(release: V4Config, kinds: list[Row]) -> Row:
    """All layers of the release, as many of each kind as it has."""
    counts = Counter[str](release.without_mtp().layer_kinds)

    def total(value: Callable[[Row], float]) -> float:
        return sum(counts[row.layer] * value(row) for row in kinds)

    timing = Timing(
        total(lambda r: r.timing.median), total(lambda r: r.timing.low),
        total(lambda r: r.timing.high),
    )  # fmt: skip
    growth = timing.median / total(lambda r: r.timing.median / r.growth)
    weights = int(total(lambda r: r.weights))
    return Row(_ALL, kinds[0].context, kinds[0].tokens, weights, timing, growth)


def section(rows: list[Row], experts: int) -> Section:
    """The table."""
    return Section(
        "Whole layers at Flash dimensions",
        (
            "layer",
            "context",
            "tokens",
            "time",
            "quartiles",
            "growth",
            "tokens/s",
            "weights read, GB",
            "GB/s",
        ),
        [
            [
                row.layer,
                f"{row.context:,}",
                f"{row.tokens:,}",
                seconds(row.timing.median),
                quartiles(row.timing),
                f"{row.growth:.2f}",
                f"{row.tokens / row.timing.median:,.1f}",
                f"{row.weights / 1e9:.2f}",
                rate(row.weights / row.timing.median),
            ]
            for row in rows
        ],
        (
            f"random weights in the official formats with {experts} routed experts (Flash has 256),"
            " caches of random rows; hyper-connections, attention and experts, without embedding"
            " and head; the layers' weights take turns, and no cache holds those of one",
            "all layers: the sum of Flash's 2 SWA, 21 CSA and 20 HCA layers; growth: of one token,"
            " to the shortest context",
        ),
    )
