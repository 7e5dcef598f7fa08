"""What adapters of engines share, without an engine: declared parts, and 300 random schedules whose
texts are those of our own engine.
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine
from fake_server import Server, Wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import seed_of
from tiny_networks import random_model

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.integrations.serving import ascend_blocks, cache_parts, entry_block_bytes
from dsv4_ascend.model.profile import PROFILES

SIZES = {
    "window": [2, 4, 8],
    "entries": [16],
    "index_keys": [4, 8, 16],
    "state": [1, 2, 4],
    "index_state": [1, 2, 4],
}
LONGEST, NEW = 24, 4


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def texts(model):
    """Prompts, half of which begin alike, each followed by its greedy text."""
    rng = random.Random(seed_of(__name__))
    common = [rng.randrange(97) for _ in range(20)]
    prompts = [common[: rng.choice([0, 18, 20])] for _ in range(12)]
    for prompt in prompts:
        prompt += [rng.randrange(97) for _ in range(rng.randint(1, LONGEST - len(prompt)))]
    new = model.generate(prompts, max_new_tokens=NEW, stop_ids=[])
    return [(p, t) for p, t in zip(prompts, new, strict=True)]


WANTED = st.tuples(st.integers(0, 11), st.integers(1, NEW), st.integers(0, NEW - 1))
"""A text, how many tokens of it, and how many of those the prompt has already."""


def serve(model, texts, requests, drafts, seed, packed, upset):
    """One schedule: what it had, after a look at its texts."""
    rng = random.Random(seed)
    engine = FakeEngine(
        model, rng, 32, SIZES, packed=packed, check_contents=False, bound_lengths=True, blocks=600
    )
    wanted = []
    for number, most, given_already in requests:
        prompt, text = texts[number]
        at = min(given_already, len(text) - 1)
        wanted.append(Wanted(prompt + text[:at], text[at : at + most], drafts))
    server = Server(engine, rng, step_tokens=24, upset=upset)
    for number, text in server.serve(wanted).items():
        assert text == wanted[number].text
    return server.counts


def test_texts_of_300_schedules_are_those_of_our_own_engine(model, texts):
    """Chunked, prefix-cached, drafted, preempted and cancelled."""
    counts = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        requests=st.lists(WANTED, min_size=1, max_size=3),
        drafts=st.sampled_from([0, 1, 3]),
        seed=st.integers(0, 1 << 30),
        packed=st.booleans(),
        upset=st.sampled_from([0.0, 0.2]),
    )
    def run(**schedule):
        counts.update(serve(model, texts, **schedule), schedules=1)

    run()
    assert counts["schedules"] >= 300
    print(counts)
    assert all(counts[name] for name in ("hits", "preempted", "cancelled", "accepted", "rejected"))


def test_a_draft_that_is_kept_unverified_shows(model, texts):
    """The check above can fail: a server that takes every draft writes other texts."""

    class Credulous(Server):
        def _decide(self, one, true):
            one.known += one.drafts[: one.missing - 1] + true[-1:]
            one.drafts = []
            return 0

    rng = random.Random(seed_of(__name__))
    server = Credulous(FakeEngine(model, rng, 64, SIZES, check_contents=False), rng, 24)
    wanted = [Wanted(prompt, text, 3) for prompt, text in texts]
    assert server.serve(wanted) != {n: w.text for n, w in enumerate(wanted)}


@pytest.mark.parametrize(
    ("profile", "entry", "key"),
    [("official", 1024, 256), ("a2a3-int8", 1024, 130), ("a5-mx", 608, 132)],
)
def test_bytes_that_grow_with_a_sequence(profile, entry, key):
    """Per 256 tokens 64 entries and keys of a CSA layer, 2 entries of an HCA layer (v4.md 6.5)."""
    for config, csa, hca in ((V4Config.flash(), 21, 20), (V4Config.pro(), 30, 31)):
        parts = cache_parts(config, PROFILES[profile])
        assert entry_block_bytes(parts) == csa * 64 * (entry + key) + hca * 2 * entry


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("config", [V4Config.flash(), V4Config.pro()], ids=["flash", "pro"])
def test_declared_parts(profile, config):
    parts = cache_parts(config, PROFILES[profile])
    keys = [part.key for part in parts]
    assert len(set(keys)) == len(keys)
    assert all(len([p for p in key.split(".") if p.isdigit()]) == 1 for key in keys)
    assert parts[-1].layer == config.num_hidden_layers
    assert {part.block for part in parts} == {4, 8, 64, 256}
    assert all(part.block % part.tokens == 0 for part in parts)
    assert all(part.window is None or part.window > 1 for part in parts)
    count = {name: sum(part.name == name for part in parts) for name in SIZES}
    kinds = [config.layer_kinds.count(kind) for kind in ("csa", "hca")]
    assert count["window"] == len(config.layer_kinds)
    assert count["entries"] == count["state"] == sum(kinds)
    assert count["index_keys"] == count["index_state"] == kinds[0]


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("config", [V4Config.flash(), V4Config.pro()], ids=["flash", "pro"])
def test_pages_that_vllm_ascend_can_plan(config, profile, rows):
    """Read in its patch_kv_cache_utils: memory is planned in the pages of the entries' smaller
    block; those of the larger one are among them, all others are padded to one, as many to each.
    """
    pages = defaultdict(list)
    for part in cache_parts(config, PROFILES[profile], ascend_blocks(rows)):
        assert part.block % part.tokens == 0
        size = part.block // part.tokens * part.row_bytes
        pages[part.window is None, part.block].append(size)
    csa, hca = sorted(block for lasting, block in pages if lasting)
    assert (csa, hca) == (4 * rows, 128 * rows)
    planned = sorted(set(pages[True, csa]))
    assert set(pages[True, hca]) == {max(planned)}
    for (lasting, _), sizes in pages.items():
        if not lasting:
            padded = Counter(min(p for p in planned if p >= size) for size in sizes)
            assert len(set(padded.values())) == 1


@pytest.mark.parametrize("profile", ["a2a3-int8", "a5-mx"])
def test_byte_parts_are_views_of_an_engines_pages(profile):
    """Bytes of rows [blocks, rows, bytes], strided between blocks, are pages of our formats."""
    for part in cache_parts(V4Config.flash(), PROFILES[profile]):
        rows = part.block // part.tokens
        storage = torch.zeros(3, rows * part.row_bytes + 64, dtype=torch.uint8)
        pages = storage[:, : rows * part.row_bytes].view(part.dtype).unflatten(1, (rows, -1))
        paged = part.paged(pages, torch.zeros(1, 1, dtype=torch.int32))
        assert paged.block_size == rows
        assert paged.tensor.data_ptr() == storage.data_ptr()
        assert paged.tensor.stride(0) * part.dtype.itemsize == storage.stride(0)


def test_registration_is_inert_without_vllm():
    """It imports nothing of ours but itself, and with DSV4_VLLM=0 nothing at all."""
    code = (
        "import sys, torch; from dsv4_ascend.integrations.vllm import register; register(); "
        "print(sorted(m for m in sys.modules if m.startswith(('dsv4_', 'vllm'))))"
    )
    environ = {**os.environ, "DSV4_VLLM": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    modules = ["dsv4_ascend", "dsv4_ascend.integrations", "dsv4_ascend.integrations.vllm"]
    assert done.stdout.strip() == str(modules)
    environ = {name: value for name, value in environ.items() if name != "DSV4_VLLM"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert "No module named 'vllm'" in done.stderr


def test_the_entry_point_is_declared():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    table = re.search(r'^\[project\.entry-points\."vllm.general_plugins"\].*\n(.+)$', project, re.M)
    assert table[1] == 'dsv4 = "dsv4_ascend.integrations.vllm:register"'
