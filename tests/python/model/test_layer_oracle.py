"""The shipped checkpoint in profile `official`, layer by layer, against a NumPy forward.

Each layer gets the streams, cached rows and choices that the model had, so nothing piles up and
each row stands for itself. A layer promises no order of fp32 sums, so here and there a value tips
from one bf16 or FP8 neighbour to the other. Most rows have none of that and equal the oracle bit
for bit; a rounding too few or too many touches nearly all. So the tolerance is how many rows may
differ. It was measured over three seeds, AVX2, portable and reference code, one and four threads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from layer_capture import Captured, capture
from layer_oracle import Given, Layer, Weights
from layer_rounding import EXACT, OTHERS, POINTS, Rounding
from seeds import seed_of

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.profile import OFFICIAL
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.proofs.numerics import Array

CHUNKS = [120, 124] + [1] * 16
PREFILLED, LENGTH = 244, 260
# The same weights where more acts: several 64-key tiles, the clamp, an epsilon that bf16 can see.
CONFIGS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "stretched": {
        "sliding_window": 96,
        "index_topk": 40,
        "swiglu_limit": 0.5,
        "rms_norm_eps": 0.03,
    },
}
LAYERS = ["swa, hash", "csa", "hca", "csa again", "mtp"]


class Limit(NamedTuple):
    """At least `same` of the rows have at most `tipped` of their elements off, bit for bit."""

    tipped: float
    same: float


LIMITS = {
    "streams": Limit(0, 0.8),  # seen: 0.89 or more; 0.61 or less without a point of the MoE
    "queries": Limit(0.1, 0.97),  # seen: 0.99 or more; 0.93 without the square's rounding
    "window": Limit(0.1, 0.97),
    "entries": Limit(0.1, 0.97),
    "index keys": Limit(0, 0.9),
    "index scores": Limit(0.1, 0.97),
}
DECODED = Limit(0, 0.5)  # streams of the 16 decoded tokens
FARTHEST = 0.1  # rms error of one token over the rms of what the layer adds to it; seen: 0.033


@functools.cache
def weights() -> Weights:
    return Weights(open_checkpoint(SHIPPED))


@functools.cache
def config(name: str) -> V4Config:
    return dataclasses.replace(weights().checkpoint.config, **CONFIGS[name])


@functools.cache
def captured(name: str) -> list[Captured]:
    device = torch.device("cpu")
    network = assign_all(
        Transformer(config(name), OFFICIAL), weights().checkpoint.tensors(), device
    )
    generator = torch.Generator().manual_seed(seed_of(name))
    ids = torch.randint(2, network.config.vocab_size, (LENGTH + 1,), generator=generator)
    return capture(Model(network, device=device), ids.tolist(), CHUNKS)


class Run(NamedTuple):
    """One layer by the oracle: what it made, what it added to its streams, the points it has."""

    parts: dict[str, Array]
    added: Array
    asked: set[str]


def run(name: str, number: int, r: Rounding, given: Given | None = None, **other: Any) -> Run:
    """Layer `number` of a config, with another one's values where `other` names them."""
    seen, c = captured(name)[number], dataclasses.replace(config(name), **other)
    depth = number - c.num_hidden_layers
    prefix = f"layers.{number}" if depth < 0 else f"mtp.{depth}"
    kind, ratio = c.layer_kinds[number], c.compress_ratios[number]
    layer = Layer(c, weights(), prefix, kind, ratio, number < c.num_hash_layers, r)
    x = seen.streams if depth < 0 else layer.combine(seen.ids, seen.streams)
    out = layer.run(x, seen.ids, given or seen.given)
    return Run(layer.parts, out - x, r.asked)


@functools.cache
def plain(name: str, number: int) -> Run:
    return run(name, number, Rounding())


def same_rows(got: Array, want: Array, tipped: float) -> Array:
    """Which rows are the same, bool [rows]."""
    differ = (got != want).reshape(len(got), -1)
    return np.asarray(differ.mean(1) <= tipped)


def exceeded(name: str, number: int, found: Run) -> list[str]:
    """The limits that one layer of the model exceeds, with what was found."""
    parts = captured(name)[number].parts
    same = {p: same_rows(parts[p], found.parts[p], LIMITS[p].tipped) for p in parts}
    shares = {(p, LIMITS[p]): float(rows.mean()) for p, rows in same.items()}
    shares["streams of decoded tokens", DECODED] = float(same["streams"][PREFILLED:].mean())
    error = ((parts["streams"] - found.parts["streams"]) ** 2).mean((1, 2))
    farthest = float(np.sqrt(error / (found.added**2).mean((1, 2))).max())
    told = [f"{p}: {s:.3f} of the rows" for (p, limit), s in shares.items() if s < limit.same]
    return told + [f"one token is {farthest:.2f} off"] * (farthest > FARTHEST)


def where(point: str) -> list[tuple[str, int]]:
    """(config, layer) that have a point."""
    every = [(name, number) for number in range(len(LAYERS)) for name in CONFIGS]
    return [at for at in every if point in plain(*at).asked]


def noticed(point: str, r: Rounding) -> bool:
    return any(exceeded(*at, run(*at, r)) for at in where(point))


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_the_one_of_the_spec(name: str, number: int) -> None:
    assert exceeded(name, number, plain(name, number)) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_reach_every_branch(name: str) -> None:
    """Beyond top-k, two HCA entries (one closed while decoding), in one config several tiles."""
    c, (_, csa, hca, *_) = config(name), captured(name)
    assert len(csa.parts["entries"]) > c.index_topk
    assert PREFILLED // 128 < len(hca.parts["entries"]) == 2
    assert (c.sliding_window + c.index_topk > 128) == (name == "stretched")


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gate_chooses_as_the_spec_says(name: str, number: int) -> None:
    """The k largest, unless they are closer than what a tipped bit moves a score by."""
    rank, experts = plain(name, number).parts["expert rank"], captured(name)[number].given.experts
    k = experts.shape[1]
    largest = np.sort(rank, 1)[:, -k:]
    taken = np.sort(np.take_along_axis(rank, experts, 1), 1)
    assert np.abs(largest - taken).max() < 1e-3
    assert (largest == taken).all(1).mean() >= 0.99
    assert all(len(set(row)) == k for row in experts.tolist())


@pytest.mark.parametrize("point", [p for row in POINTS.values() for p in row if p not in EXACT])
def test_a_removed_rounding_point_is_noticed(point: str) -> None:
    assert noticed(point, Rounding(without=frozenset({point})))


@pytest.mark.parametrize("other", OTHERS)
def test_a_rounding_of_another_implementation_is_noticed(other: str) -> None:
    assert noticed(other, Rounding(added=frozenset({other})))


@pytest.mark.parametrize("point", EXACT)
def test_an_exact_point_rounds_nothing(point: str) -> None:
    for at in where(point)[:4]:
        found = run(*at, Rounding(without=frozenset({point}))).parts
        assert all((found[part] == value).all() for part, value in plain(*at).parts.items())


def test_every_point_is_listed() -> None:
    runs = [plain(name, number) for name in CONFIGS for number in range(len(LAYERS))]
    asked = set().union(*(found.asked for found in runs))
    assert asked == {p for row in POINTS.values() for p in row} | set(OTHERS)


@pytest.mark.parametrize(
    ("number", "other"),
    [
        (0, {"swiglu_limit": 10.0}),
        (0, {"rms_norm_eps": 1e-6}),
        (0, {"routed_scaling_factor": 1.51}),
        (0, {"sliding_window": 95}),
        (0, {"rope_theta": 10010.0}),
        (0, {"hc_sinkhorn_iters": 2}),
        (1, {"compress_rope_theta": 160100.0}),
        (2, {"rope_theta": 1.0, "compress_rope_theta": 10000.0}),
    ],
    ids=str,
)
def test_another_configuration_is_noticed(number: int, other: dict[str, Any]) -> None:
    assert exceeded("stretched", number, run("stretched", number, Rounding(), **other))


@pytest.mark.parametrize("token", [0, 130, LENGTH - 1])
def test_one_token_with_another_expert_is_noticed(token: int) -> None:
    given = captured("shipped")[0].given
    experts = given.experts.copy()
    experts[token] = (experts[token] + 1) % config("shipped").n_routed_experts
    wrong = run("shipped", 0, Rounding(), dataclasses.replace(given, experts=experts))
    assert exceeded("shipped", 0, wrong)


CHOOSE = {
    "without the last one": lambda chosen, visible: np.where(
        np.arange(chosen.shape[1]) < chosen.shape[1] - 1, chosen, -1
    ),
    "in reversed order": lambda chosen, visible: chosen[:, ::-1],
    "the newest instead of the best": lambda chosen, visible: np.where(
        chosen >= 0, visible[:, None] - 1 - np.arange(chosen.shape[1]), -1
    ),
}


@pytest.mark.parametrize("fault", CHOOSE)
def test_other_chosen_entries_are_noticed(fault: str) -> None:
    given = captured("stretched")[1].given
    assert given.chosen is not None
    chosen = CHOOSE[fault](given.chosen, (np.arange(LENGTH) + 1) // 4)
    wrong = run("stretched", 1, Rounding(), dataclasses.replace(given, chosen=chosen))
    assert exceeded("stretched", 1, wrong)
