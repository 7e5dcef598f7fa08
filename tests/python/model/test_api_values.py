"""Every value of the Python interface is what its docstring says, or an ArgumentError that names it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_networks import CONFIG, random_model

from dsv4_ascend.model.model import Model
from dsv4_backend.errors import ArgumentError


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(CONFIG)


NO_INTEGER = [None, True, np.True_, 1.0, math.nan, "1", b"1", [1], {}, torch.tensor(1.0), torch.tensor(True)]
NO_NUMBER = [None, True, np.False_, math.nan, math.inf, -math.inf, "0.5", [0.5], 1j, torch.tensor([0.1, 0.2])]
GENERATE = {
    "max_new_tokens": [*NO_INTEGER, -1],
    "draft_tokens": [*NO_INTEGER, -1],
    "seed": [*NO_INTEGER, 2**64, -(2**63) - 1, 10**30],
    "temperature": [*NO_NUMBER, -0.1],
    "top_p": [*NO_NUMBER, 0, -0.5, 1.0001],
    "stop_ids": [3, "12", b"1", [1.0], [True], {"a"}, [-1], [CONFIG.vocab_size]],
}
FORWARD = {
    "chunk": [*NO_INTEGER[1:], 0, -1],
    "decode_from": [*NO_INTEGER[1:], -1],
    "block_size": [*NO_INTEGER, 0],
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
    for value in (*NO_INTEGER, -1):
        with pytest.raises(ArgumentError, match=f"^{name}: found .*expected"):
            model.new_cache(**{**sizes, name: value})


def test_numbers_of_other_libraries_are_numbers(model: Model) -> None:
    plain = model.generate([[3]], max_new_tokens=3, temperature=1.0, top_p=0.5, seed=7, stop_ids={5})
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
