"""The indexer of profiles a2a3-int8 and a5-mx: each rounding point against a formula written here.

Source: spec/deployments.md 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_networks import QUANTISED, write_quantised
from seeds import seed_of
from torch.nn.functional import linear

from dsv4_ascend.model import ascend
from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.paged import Paged
from dsv4_ascend.model.profile import Prepare
from dsv4_ascend.model.rows import Codes, IndexerParts
from dsv4_ascend.weights.linear import Linear
from dsv4_backend import dispatch
from dsv4_backend.ops.indexer_prolog import rotate
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant
from dsv4_backend.proofs.numerics import BF16, E4M3

LENGTH = 96
IDS = torch.randint(
    0, QUANTISED.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed_of(__name__))
).tolist()
both = pytest.mark.parametrize("name", ["a2a3-int8", "a5-mx"])


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    """One operator and its steps have the same bits where both are references; a kernel of a step
    may round a rotation to the other neighbour.
    """
    with dispatch.use("reference"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantised(tmp_path_factory.mktemp("quantised") / "checkpoint", QUANTISED)


class Seen:
    """What one prefill handed to the selection, and what it was made from."""

    def __init__(self, model: Model, patch: pytest.MonkeyPatch) -> None:
        self.selected: tuple[torch.Tensor, ...] = ()
        self.rotated = self.keys = self.x = torch.empty(0)
        for name, select in ascend.INDEXERS.items():
            patch.setitem(ascend.INDEXERS, name, self._selecting(select))
        (self.indexer,) = (m.attn.indexer for m in model.network.layers if m.attn.kind == "csa")
        form = self.indexer.form
        self.indexer.form = dataclasses.replace(form, prepare=self._preparing(form.prepare))

    def _selecting(self, select: Callable[..., torch.Tensor]) -> Any:
        def seen(*given: torch.Tensor) -> torch.Tensor:
            self.selected = given
            return select(*given)

        return seen

    def _preparing(self, prepare: Prepare) -> Prepare:
        def seen(
            parts: IndexerParts, slots: torch.Tensor, keys: Paged
        ) -> tuple[Codes, torch.Tensor]:
            self.x, self.keys, self.rotated = parts.x, parts.keys(), parts.queries()
            return prepare(parts, slots, keys)

        return seen


SIGNS = np.array(
    [[(-1) ** bin(i & j).count("1") for j in range(64)] for i in range(64)], np.float64
)


def index_by_hand(rows: np.ndarray, name: str, keys: bool = False) -> np.ndarray:
    """Rotated by the +-1 matrix to bf16, then codes with a scale per row: fp16 beside int8,
    fp32 beside e4m3, where the writer of keys multiplies by reciprocals.
    """
    turned = (rows.astype(np.float64) @ SIGNS).astype(np.float32).astype(BF16).astype(np.float32)
    amax = np.abs(turned).max(-1, keepdims=True)
    if name == "a2a3-int8":
        scale = amax / np.float32(127)
        return np.rint(turned / scale).astype(np.float32) * scale.astype(np.float16).astype(
            np.float32
        )
    if keys:
        scale = amax * np.float32(1 / 448)
        return (turned * (np.float32(1) / scale)).astype(E4M3).astype(np.float32) * scale
    scale = amax / np.float32(448)
    return (turned / scale).astype(E4M3).astype(np.float32) * scale


def index_points(model: Model, patch: pytest.MonkeyPatch, name: str) -> dict[str, bool]:
    """Which rounding points of the indexer one prefill shows."""
    seen = Seen(model, patch)
    with torch.inference_mode():
        model.forward(IDS)
    q, q_scale, codes, scales, weights = seen.selected[:5]
    queries = q.float() * q_scale.float().unsqueeze(-1)
    rows = codes.float() * scales.float().unsqueeze(-1)
    stored = {tuple(row) for row in rows.flatten(0, 1).tolist()}
    keys = index_by_hand(seen.keys[: LENGTH // 4].float().numpy(), name, keys=True)
    exact = linear(seen.x.float(), seen.indexer.weights_proj.weight.float())
    rounded = exact.half() if name == "a2a3-int8" else exact
    return {
        "keys": {tuple(row) for row in keys.tolist()} <= stored,
        "queries": np.array_equal(
            queries.numpy(), index_by_hand(seen.rotated.float().numpy(), name)
        ),
        "weights": torch.equal(weights, rounded)
        and not torch.equal(weights.float(), weights.bfloat16().float()),
    }


@both
def test_the_indexer_rounds_where_the_chips_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert set(index_points(load(folder, profile=name), monkeypatch, name).values()) == {True}


def _unturned(x: torch.Tensor) -> torch.Tensor:
    return x


def _in_fp32(weights_proj: Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x.float(), weights_proj.stored().values(torch.float32))


def _in_steps(name: str, **changed: Callable[..., torch.Tensor]) -> Prepare:
    """The same step by step, with other functions for some of the steps."""
    turn_keys, turn_queries = (changed.get(side, rotate) for side in ("keys", "queries"))
    quantise = int8_token_quant if name == "a2a3-int8" else fp8_token_quant
    small = torch.float16 if name == "a2a3-int8" else torch.float32
    weigh = changed.get("weights", _in_fp32)

    def prepare(
        parts: IndexerParts, slots: torch.Tensor, keys: Paged
    ) -> tuple[Codes, torch.Tensor]:
        keys.write(turn_keys(parts.keys()), slots)
        codes, scale = quantise(turn_queries(parts.queries()))
        return (codes, scale.to(small)), weigh(parts.weights_proj, parts.x).to(small)

    return prepare


@both
def test_in_one_step_or_in_several_the_indexer_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    selected = []
    for prepare in (None, _in_steps(name)):
        model = load(folder, profile=name)
        (indexer,) = (m.attn.indexer for m in model.network.layers if m.attn.kind == "csa")
        if prepare is not None:
            indexer.form = dataclasses.replace(indexer.form, prepare=prepare)
        seen = Seen(model, monkeypatch)
        with torch.inference_mode():
            model.forward(IDS)
        selected.append(seen.selected[:4])
    for one, other in zip(*selected, strict=True):
        assert torch.equal(one.float(), other.float())


REMOVED: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "keys not rotated": ("keys", _unturned),
    "queries not rotated": ("queries", _unturned),
    "weights in bf16": ("weights", lambda weights_proj, x: weights_proj(x)),
}


@both
@pytest.mark.parametrize("removed", REMOVED)
def test_a_removed_rounding_point_of_the_indexer_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, removed: str
) -> None:
    model = load(folder, profile=name)
    (indexer,) = (m.attn.indexer for m in model.network.layers if m.attn.kind == "csa")
    point, change = REMOVED[removed]
    prepare = _in_steps(name, **{point: change})
    indexer.form = dataclasses.replace(indexer.form, prepare=prepare)
    found = index_points(model, monkeypatch, name)
    assert [name for name, there in found.items() if not there] == [point]
