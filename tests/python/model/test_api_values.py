"""Every value of the Python interface is what its docstring says,
or an ArgumentError that names it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from seeds import seed_of
from tiny_networks import CONFIG, random_model

from dsv4_ascend.model import model as model_module
from dsv4_ascend.model.model import Model, load, usable_device
from dsv4_backend.errors import ArgumentError, EnvironmentFault


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return random_model(CONFIG, seed=seed_of(request.node.nodeid))


NO_INTEGER = [
    None,
    True,
    np.True_,
    1.0,
    math.nan,
    "1",
    b"1",
    [1],
    {},
    torch.tensor(1.0),
    torch.tensor(True),
]
NO_NUMBER = [
    None,
    True,
    np.False_,
    math.nan,
    math.inf,
    -math.inf,
    "0.5",
    [0.5],
    1j,
    torch.tensor([0.1, 0.2]),
]
GENERATE = {
    "max_new_tokens": [*NO_INTEGER, -1],
    "draft_tokens": [*NO_INTEGER, -1, 2**31, 2**70],
    "seed": [*NO_INTEGER, 2**64, -(2**63) - 1, 10**30],
    "temperature": [*NO_NUMBER, -0.1],
    "top_p": [*NO_NUMBER, 0, -0.5, 1.0001],
    "stop_ids": [3, "12", b"1", [1.0], [True], {"a"}, [-1], [CONFIG.vocab_size]],
}
FORWARD = {
    "chunk": [*NO_INTEGER[1:], 0, -1],
    "decode_from": [*NO_INTEGER[1:], -1],
    "block_size": [*NO_INTEGER, 0, 2**31, 2**70],
}


@pytest.mark.parametrize("name", GENERATE)
def test_stream_names_a_bad_value_at_once(model: Model, name: str) -> None:
    for value in GENERATE[name]:
        with pytest.raises(ArgumentError, match=f"^{name}: found .*expected"):
            model.stream([[3]], **{name: value})


@pytest.mark.parametrize("name", FORWARD)
def test_forward_names_a_bad_value(model: Model, name: str) -> None:
    for value in FORWARD[name]:
        with pytest.raises(ArgumentError, match=f"^{name}: found .*expected"):
            model.forward([3], **{name: value})


@pytest.mark.parametrize("name", ["max_sequences", "max_tokens", "max_step_tokens", "block_size"])
def test_a_cache_names_a_bad_value(model: Model, name: str) -> None:
    sizes = {"max_sequences": 1, "max_tokens": 4, "max_step_tokens": 4, "block_size": 4}
    for value in (*NO_INTEGER, -1, 2**31, 2**70):
        with pytest.raises(ArgumentError, match=f"^{name}: found .*expected"):
            model.new_cache(**{**sizes, name: value})


def test_numbers_of_other_libraries_are_numbers(model: Model) -> None:
    plain = model.generate(
        [[3]], max_new_tokens=3, temperature=1.0, top_p=0.5, seed=7, stop_ids={5}
    )
    kinds = (np.int64, np.uint8, torch.tensor)
    for kind in kinds:
        real = torch.tensor if kind is torch.tensor else np.float64
        options = {"temperature": real(1.0), "top_p": real(0.5), "stop_ids": [kind(5)]}
        assert model.generate([[3]], max_new_tokens=kind(3), seed=kind(7), **options) == plain
    assert torch.equal(model.forward([3, 4], chunk=np.int32(1)), model.forward([3, 4], chunk=1))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(model: Model, seed: int) -> None:
    options = {"max_new_tokens": 2, "temperature": 1.0, "seed": seed}
    assert model.generate([[3]], **options) == model.generate([[3]], **options)


@pytest.mark.parametrize("path", [None, 5, b"/tmp", ["a"], "a\0b"])
def test_load_names_a_bad_path(path: object) -> None:
    with pytest.raises(ArgumentError, match=r"^path: found .*expected the path"):
        load(path)


@pytest.mark.parametrize("progress", [5, "bar", True])
def test_load_names_a_bad_progress(progress: object) -> None:
    with pytest.raises(ArgumentError, match=r"^progress: found .*expected a function"):
        load("nowhere", progress=progress)


@pytest.mark.parametrize("device", ["npu:", "npu:x", "npu:-1", "cpu:0:1", "npux", 5, None])
def test_a_device_is_named(device: object) -> None:
    with pytest.raises(ArgumentError, match=r"^device: found .*expected cpu or npu"):
        usable_device(device)


@pytest.mark.parametrize("device", ["npu:8", "npu:9", "npu:31"])
def test_a_device_beyond_those_there_is_counted(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(model_module, "npu_count", lambda: 8)
    with pytest.raises(
        EnvironmentFault, match=rf"^--device: found {device}, expected one of 8 devices"
    ):
        usable_device(device, "--device")


@pytest.mark.parametrize("drafts", [2, 10**6, 2**31 - 1])
@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 3])
def test_drafts_end_with_the_text(drafts: int, max_new_tokens: int) -> None:
    model = random_model(dataclasses.replace(CONFIG, num_nextn_predict_layers=1))
    options = {"max_new_tokens": max_new_tokens, "stop_ids": ()}
    assert model.generate([[3], [4, 5]], draft_tokens=drafts, **options) == model.generate(
        [[3], [4, 5]], **options
    )
