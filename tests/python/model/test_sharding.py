"""What of a checkpoint belongs to a rank: all of it, once; what it reads; what is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import os
import re
import signal
from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_networks import QUANTISED, write_quantised
from rank_processes import fork_ranks
from tiny_checkpoints import bits

from dsv4_ascend.checkpoint import folder
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.experts import EXPERT
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import layout
from dsv4_ascend.model.model import load
from dsv4_ascend.model.parallel import Parallel
from dsv4_ascend.model.profile import A5_MX, IDEAL, OFFICIAL
from dsv4_ascend.model.sharding import DeviceLayout, Sharding, layouts, misfits, working
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.errors import ArgumentError

LONG = pytest.mark.long
DIVIDED = re.compile(
    r"(embed|head)\.weight|(layers|mtp)\.\d+\.attn\.(wq_b\..*|wo_a\..*|wo_b\..*|attn_sink)"
)
"""What tensor parallel divides, written down a second time."""
FOUR_GROUPS = dataclasses.replace(QUANTISED, o_groups=4, vocab_size=96)


@pytest.fixture(scope="module")
def four_groups(tmp_path_factory):
    return write_quantised(tmp_path_factory.mktemp("groups") / "checkpoint", FOUR_GROUPS)


def shardings(shape: DeviceLayout) -> list[Sharding]:
    return [Sharding(shape, rank, OFFICIAL) for rank in range(shape.world)]


def parts(path, sharding):
    """Name -> the rank's part of it, experts one by one."""
    checkpoint = open_checkpoint(path, owner=sharding.owner)
    return {name: sharding.local(name, tensor) for name, tensor in checkpoint.tensors()}


@settings(max_examples=6, deadline=None)
@given(world=st.sampled_from([2, 4]), data=st.data())
def test_all_ranks_together_have_the_checkpoint_and_nothing_twice(four_groups, world, data):
    fitting = [s for s in layouts(world) if not list(misfits(s, FOUR_GROUPS, OFFICIAL))]
    shape = data.draw(st.sampled_from(fitting))
    whole = open_checkpoint(four_groups)
    held = [parts(four_groups, sharding) for sharding in shardings(shape)]
    for name in whole.names():
        copies = [(rank, own[name]) for rank, own in enumerate(held) if name in own]
        if EXPERT.fullmatch(name):
            # Once in every expert group.
            assert [rank // shape.ep for rank, _ in copies] == list(range(world // shape.ep))
            same = [tensor for _, tensor in copies]
        elif DIVIDED.fullmatch(name):
            dim = 1 if ".wo_b." in name else 0
            groups = [copies[i : i + shape.tp] for i in range(0, world, shape.tp)]
            same = [torch.cat([t.view(torch.uint8) if t.element_size() == 1 else t
                               for _, t in group], dim) for group in groups]  # fmt: skip
        else:
            assert len(copies) == world
            same = [tensor for _, tensor in copies]
        assert {bits(tensor) for tensor in same} == {bits(whole.tensor(name))}, name
    experts = Counter(name for own in held for name in own if EXPERT.fullmatch(name))
    assert set(experts.values()) == {world // shape.ep}


def foreign_ranges(sharding: Sharding, config: V4Config, sources):
    """(address, bytes) of what other ranks have in the mapped files.

    Without scales of divided weights, which are checked whole, and columns, whose pages are shared.
    """
    owns = sharding.owner(config)
    for name, source in sources.items():
        start = source.file._bytes.data_ptr() + source.begin
        cut = (
            None if "wo_b" in name or name.endswith(".scale") else sharding.cut(name, source.shape)
        )
        if not owns(name):
            yield start, source.nbytes
        elif cut is not None:
            row = source.nbytes // source.shape[0]
            behind = (cut.start + cut.length) * row
            yield start, cut.start * row
            yield start + behind, source.nbytes - behind


def protect(ranges) -> int:
    """Have every access to whole pages of these end the process; how many bytes they are."""
    libc, page, total = ctypes.CDLL(None), os.sysconf("SC_PAGE_SIZE"), 0
    runs: list[tuple[int, int]] = []
    for begin, size in sorted(ranges):  # what touches is one run
        if runs and sum(runs[-1]) == begin:
            begin, size = runs[-1][0], runs.pop()[1] + size
        runs.append((begin, size))
    for begin, size in runs:
        first, last = -(-begin // page) * page, (begin + size) // page * page
        if last > first:
            assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 0) == 0
            total += last - first
    return total


def load_with_others_protected(shape: DeviceLayout, rank: int, claimed: DeviceLayout):
    """Load, and read every parameter, as a rank of `shape` where the pages of all others of
    `claimed` are out of reach: protected bytes and how many they could be, and what is held.
    """
    ordered, sharding, told = folder._ordered, Sharding(claimed, rank, IDEAL), []

    def before_values_are_read(sources, entries):
        ranges = list(foreign_ranges(sharding, config, sources))
        told.extend((protect(ranges), sum(size for _, size in ranges)))
        return ordered(sources, entries)

    config = open_checkpoint(SHIPPED).config
    folder._ordered = before_values_are_read
    network = load(SHIPPED, profile="ideal", parallel=Parallel(shape, rank)).network
    for parameter in network.parameters():
        parameter.contiguous().view(torch.uint8).sum()
    return *told, sum(p.nbytes for p in network.parameters())


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_no_page_of_others(tp, ep, rank):
    shape = DeviceLayout(2, tp, ep, 1)
    ((process, answer),) = fork_ranks(1, lambda _: load_with_others_protected(shape, rank, shape))
    assert answer.poll(60)
    good, told = answer.recv()
    process.join()
    assert good, told
    protected, foreign, held = told
    assert protected > 0.8 * foreign  # the rest are pages that hold something of this rank too
    whole = open_checkpoint(SHIPPED).nbytes
    assert held + foreign <= whole < 1.01 * (held + foreign) + 0.5 * (tp > 1) * bytes_of("wo_b")
    assert foreign > (0.4 * bytes_of("experts") if ep > 1 else 0.4 * bytes_of("embed"))


def bytes_of(part: str) -> int:
    sources = open_checkpoint(SHIPPED)._sources
    return sum(source.nbytes for name, source in sources.items() if part in name)


def test_reading_another_ranks_page_is_noticed():
    """The test above can fail: one rank that reads everything ends."""
    one, two = DeviceLayout(), DeviceLayout(2, 1, 2, 1)

    def work(_):
        faulthandler.disable()  # what is expected here is nothing to be told about
        load_with_others_protected(one, 0, two)

    ((process, _),) = fork_ranks(1, work)
    process.join(60)
    assert process.exitcode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 3, 1, 1), "--tp: found 3, expected a divisor of the 2 ranks"),
        ((5, 1, 4, 5), "--ep: found 4, expected a divisor of the 5 ranks"),
        ((4, 4, 4, 2), "--tp: found 4, expected a divisor of 2, the ranks of each of 2 data"),
        ((12, 4, 6, 3), "--ep: found 6, expected a divisor or a multiple of 4, the ranks"),
        ((4, 1, 1, 0), "--dp: found 0, expected a divisor of the 4 ranks"),
    ],
)
def test_counts_that_do_not_divide_are_refused(shape, said):
    with pytest.raises(ArgumentError, match=re.escape(said)) as refused:
        DeviceLayout(*shape)
    assert f"what works with {shape[0]} ranks: --tp" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (QUANTISED, (4, 4, 4, 1), "--tp: found 4, expected a divisor of o_groups 2"),
        (QUANTISED, (2, 2, 2, 1), "--tp: found 2, expected a divisor of vocab_size 97"),
        (QUANTISED, (3, 1, 3, 3), "--ep: found 3, expected a divisor of n_routed_experts 8"),
        (
            dataclasses.replace(FOUR_GROUPS, o_lora_rank=32),
            (2, 2, 2, 1),
            "which leaves 64 columns of attn.wo_b per rank, expected a multiple of 128",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_its_weights(config, shape, said):
    sharding = Sharding(DeviceLayout(*shape), 0, OFFICIAL)
    with pytest.raises(ArgumentError, match=re.escape(said)) as refused:
        sharding.owner(config)
    assert f"what works with {shape[0]} ranks: --tp 1" in str(refused.value)


def test_heads_that_the_chips_attention_does_not_take_are_refused():
    flash, shape, chip = V4Config.flash(), DeviceLayout(8, 8, 8, 1), "Ascend950PR_9579"
    said = "--tp: found 8, which leaves 8 query heads per rank, expected 64 or 128, which"
    (line,) = misfits(shape, flash, A5_MX, chip)
    assert line.startswith(said)
    assert "--tp 1 --ep 8 --dp 8" in working(8, flash, A5_MX, chip)
    assert "--tp 2" not in working(8, flash, A5_MX, chip)
    assert "--tp 2 --ep 16 --dp 8" in working(16, V4Config.pro(), A5_MX, chip)
    assert not list(misfits(shape, flash, A5_MX, "Ascend910_9391"))
    assert not list(misfits(shape, flash, OFFICIAL, chip))


def rank_bytes(config: V4Config, shape: DeviceLayout) -> int:
    """Bytes of a rank's part of an official checkpoint (FP4 experts, FP8 linears, BF16, F32)."""
    sharding, total = Sharding(shape, 0, OFFICIAL), 0
    owns = sharding.owner(config)
    for name, entry in layout(config).items():
        if owns(name):
            dtype, sizes = entry.dtypes[0], [(name, entry.stored_shape(entry.dtypes[0]))]
            scale = entry.scale_shape(dtype)
            sizes += [(entry.scale_name, scale)] if scale else []
            for stored, size in sizes:
                cut = sharding.cut(stored, size)
                whole = 4 if name.endswith(("_fn", "_base", "_scale", "ape", "sink", "bias")) else 2
                width = {"F8_E4M3": 1, "I8": 1, "I64": 8}.get(dtype, whole)
                part = 1 if stored.endswith(".scale") else width
                total += prod(size) * part // (1 if cut is None else size[cut.dim] // cut.length)
    return total


VOCABULARY = 2 * 129_280 * 7168 * 2 / 1e9 * 7 / 8
"""What eight ranks save by dividing embed and head of Pro, which those sums do not count."""


@pytest.mark.parametrize(
    ("config", "shape", "gigabytes"),
    [
        (V4Config.flash(), DeviceLayout(8, 1, 8, 8), 28),
        pytest.param(V4Config.flash(), DeviceLayout(16, 1, 16, 16), 18, marks=LONG),
        pytest.param(V4Config.flash(), DeviceLayout(64, 1, 64, 64), 11, marks=LONG),
        pytest.param(V4Config.pro(), DeviceLayout(16, 8, 16, 2), 66 - VOCABULARY, marks=LONG),
        (V4Config.pro(), DeviceLayout(32, 8, 32, 4), 40 - VOCABULARY),
        pytest.param(V4Config.pro(), DeviceLayout(384, 1, 384, 384), 31, marks=LONG),
    ],
)
def test_sizes_of_releases_by_layout(config, shape, gigabytes):
    """Sums computed before there was this code, in whole gigabytes."""
    assert rank_bytes(config, shape) / 1e9 == pytest.approx(gigabytes, abs=0.6)
