"""Steps over an engine's caches equal steps over our own, and an engine's mistakes do not."""

import random
from dataclasses import dataclass

import pytest
import torch
from engine_schedule import Difference, Schedule, Twin
from fake_engine import FakeEngine
from tiny_networks import random_model

POWERS = {
    "window": [2, 4, 8, 16],
    "entries": [16, 32],
    "index_keys": [4, 8, 32],
    "state": [1, 2, 4, 8],
    "index_state": [1, 2, 4],
}
ODD = {
    "window": [1, 3, 12, 96],
    "entries": [16, 48, 96],
    "index_keys": [4, 12, 24, 96],
    "state": [3, 8, 12],
    "index_state": [2, 3, 6],
}
# As engines have them (tests of 512 tokens): all divide 256.
SERVED = {
    "window": [64],
    "entries": [256],
    "index_keys": [256],
    "state": [4, 8],
    "index_state": [4],
}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def official():
    return random_model(dtype=torch.bfloat16)


def texts(seed, lengths, vocabulary=97):
    """Texts of which each shares a beginning with the first."""
    rng = random.Random(seed)
    whole = [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]
    shared = [rng.choice([0.4, 0.75, 0.9]) for _ in whole]
    return [whole[0][: int(n * s)] + t[int(n * s) :] for t, n, s in zip(whole, lengths, shared, strict=True)]


def schedule(model, seed, kind=FakeEngine, sizes=POWERS, max_tokens=96, step_tokens=33, **options):
    rng = random.Random(seed)
    engine = kind(model, rng, max_tokens, sizes, **options)
    twin = Twin(model, max_tokens, step_tokens, rng.choice([1, 2]))
    return Schedule(engine, twin, rng)


LENGTHS = [70, 95, 40, 88, 61]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 0, "packed": True, "check_contents": False},
        {"seed": 1, "packed": False, "check_contents": True},
        {"seed": 2, "packed": True, "check_contents": True},
        {"seed": 3, "packed": True, "check_contents": False, "sizes": ODD},
        {"seed": 4, "packed": False, "check_contents": True, "sizes": ODD},
    ],
)
def test_an_engines_steps_equal_our_own_bit_for_bit(model, options):
    run = schedule(model, **options)
    run.run(texts(run.rng.random(), LENGTHS))
    print(run.counts, run.engine.freed, run.engine.padding, run.engine.granularity)
    assert run.counts["rejected"] > 5
    assert run.engine.freed > 50
    assert run.engine.padding > 5
    assert run.counts["hits"] > 0 or "sizes" in options
