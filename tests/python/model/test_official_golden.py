"""Profile `official` against logits of DeepSeek's own inference code (tests/data/official)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from official_checkpoints import write_official
from safetensors.torch import load_file

from dsv4_ascend.model import profile
from dsv4_ascend.model.model import Model, load
from dsv4_backend.ops.attention import sparse_attention

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "official" / "golden.safetensors")
ALLOWED = 1.05
# Times the distance that rounding alone explains; 0.79 to 1.02 (A) and 0.90 to 0.94 (C) seen
# with several orders of fp32 sums, and on A 1.4 to 1.7 with these faults of the rounding:
FAULTS = (
    "probabilities rounded against the row's maximum",
    "tiles of 128 keys",
    "newest window key first",
)


@functools.lru_cache(maxsize=1)
def model(name: str, folder: Path) -> Model:
    return load(write_official(folder / name, name))


def distance(name: str, folder: Path) -> float:
    """Relative rms distance to the official logits, whole prefill in one chunk,
    in units of the noise.
    """
    ids, want = GOLDEN[f"{name}.ids"].tolist(), GOLDEN[f"{name}.logits"]
    got = model(name, folder).forward(ids, chunk=len(ids))
    return ((got - want).norm() / want.norm() / GOLDEN[f"{name}.noise"]).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("official")


@pytest.mark.parametrize("name", ["C", "A"])
def test_official_code_is_as_near_as_its_own_rounding(folder: Path, name: str) -> None:
    assert distance(name, folder) <= ALLOWED


@pytest.mark.parametrize("fault", FAULTS)
def test_another_rounding_is_told_from_the_official_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(profile, "sparse_attention", sparse_attention.faults[fault])
    assert distance("A", folder) > 1.25
