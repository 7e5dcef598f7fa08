"""Tests of every folder share the helpers in model/ (tiny_networks, tiny_checkpoints)."""

import sys
from pathlib import Path

import bundles
import pytest

sys.path.append(str(Path(__file__).parent / "model"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Bundles by pattern, each recorded when it is asked for first."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def record(capsys, pattern):
        if pattern not in made:
            made[pattern] = folder / f"{len(made)}.safetensors"
            assert bundles.run(capsys, "parity", "-k", pattern, "--record", made[pattern])[0] == 0
        return made[pattern]

    return record


@pytest.fixture
def norm(capsys, recorded):
    return recorded(capsys, "rms_norm/")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "b.safetensors"
