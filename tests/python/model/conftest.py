"""A quantised checkpoint, and its models in the profiles of the deployments."""

from pathlib import Path

import pytest
from deployments import DEPLOYED
from quantised_networks import QUANTISED, write_quantised

from dsv4_ascend.model.model import Model, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantised(tmp_path_factory.mktemp("quantised") / "checkpoint", QUANTISED)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    return {name: load(folder, profile=name) for name in ("official", "bf16", *DEPLOYED)}
