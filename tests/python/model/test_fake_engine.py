"""Steps over an engine's caches equal steps over our own, and an engine's mistakes do not."""

import random

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


def texts(seed, lengths, shares=(0.4, 0.75, 0.9)):
    """Texts of which each shares a beginning with the first."""
    rng = random.Random(seed)
    whole = [[rng.randrange(97) for _ in range(n)] for n in lengths]
    shared = [int(rng.choice(shares) * n) for n in lengths]
    return [whole[0][:n] + text[n:] for text, n in zip(whole, shared, strict=True)]


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
    run.run(texts(options["seed"], LENGTHS))
    assert run.counts["rejected"] > 5
    assert run.engine.freed > 50
    assert run.engine.padding > 5
    assert len(run.engine.groups) > 4
    assert run.counts["hits"] > 0 or "sizes" in options  # odd blocks seldom end together


def test_packed_pages_are_strided_views_of_one_storage(model):
    engine = schedule(model, 0, packed=True).engine
    tensors = list(engine.pages.tensors.values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert all(t.stride(0) > t.shape[1] * t.shape[2] for t in tensors)
    assert {t.shape[1] for t in tensors} >= {1, 2, 4, 8}


def test_the_official_profile_too(official):
    run = schedule(official, 5, check_contents=False)
    run.run(texts(5, LENGTHS))
    assert run.counts["hits"] > 0


def test_blocks_as_engines_have_them(model):
    run = schedule(model, 6, sizes=SERVED, max_tokens=512, step_tokens=160, check_contents=False)
    run.run(texts(6, [370, 300, 290], shares=[0.95]))
    assert run.engine.granularity == 256
    assert run.counts["hits"] > 0


@pytest.mark.parametrize("seed", [10, 11])
def test_batches_continue_as_single_requests_do(model, seed):
    """Other batch mates, chunks and lengths of tables: equal but for the order of fp32 sums."""
    run = schedule(model, seed, bound_lengths=True, check_contents=False)
    run.tolerance = 1e-4
    for item in run.run(texts(seed, LENGTHS)):
        positions = sorted(item.logits)
        got = torch.stack([item.logits[p] for p in positions])
        want = model.forward([item.text[:-1]])[positions]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
        assert torch.equal(got.argmax(-1), want.argmax(-1))


# What engines can get wrong: each shows as other bits, or as a block id that is none.


def wrong_table(name, layer):
    """A part finds its rows through the table of another group."""

    class Fault(FakeEngine):
        def group_of(self, part):
            right = super().group_of(part)
            return (right + 1) % len(self.groups) if part[:2] == (layer, name) else right

    return Fault


def freed_early(name):
    """A block goes one token before its last token has passed."""

    class Fault(FakeEngine):
        def passed(self, group, computed):
            tokens = super().passed(group, computed)
            return tokens + (tokens > 0 and name in [part.name for part in group.parts])

    return Fault


class OtherRatiosState(FakeEngine):
    """The CSA layer's compressor gets the state table of the HCA layer."""

    def group_of(self, part):
        states = [p for group in self.groups for p in group.parts if p[:2] == (2, "state")]
        return super().group_of(states[0] if part[:2] == (1, "state") else part)


class SharedBlockWritten(FakeEngine):
    """A prefix ends inside a block, which its users then write."""

    def shareable(self, computed):
        return computed > 0


class RejectedTokensCount(FakeEngine):
    """Windows pass as if three rejected drafts were tokens."""

    def passed(self, group, computed):
        return super().passed(group, computed + 3)


FAULTS = {
    **{f"the table of another group: {name}": wrong_table(name, 1) for name in POWERS},
    **{f"the same, HCA: {name}": wrong_table(name, 2) for name in ("window", "entries", "state")},
    "the same, MTP: window": wrong_table("window", 3),
    **{f"freed early: {name}": freed_early(name) for name in ("window", "state", "index_state")},
    "the state table of the other ratio": OtherRatiosState,
    "a shared block written": SharedBlockWritten,
    "rejected tokens count": RejectedTokensCount,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engines_mistake_shows(model, fault):
    run = schedule(model, 0, FAULTS[fault], check_contents=False)
    with pytest.raises((Difference, IndexError)):
        run.run(texts(0, LENGTHS))
