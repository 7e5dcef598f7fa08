"""Profile ideal equals transformers in fp32 to 1e-4 absolute on logits,
however the logits are computed.
"""

from __future__ import annotations

import random
from pathlib import Path

import oracle
import pytest
import torch
from seeds import generator, seed_of

import dsv4_ascend

LIMIT = 1e-4


def _ids(shape: dict, length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, shape["vocab_size"], (length,), generator=generator(seed)).tolist()


def _pair(shape: dict, folder: Path, seed: int = 0, narrow: bool = False):
    theirs = oracle.make_model(shape, torch.initial_seed() + seed)
    if narrow:
        for tensor in theirs.state_dict(keep_vars=True).values():
            tensor.data = tensor.data.bfloat16() if tensor.is_floating_point() else tensor.data
    ours = dsv4_ascend.load(oracle.save(theirs, folder), dtype=torch.float32)
    return theirs, ours


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    worst = (got - want).abs().max().item()
    assert worst <= LIMIT, f"logits differ by {worst:.2e}"


@pytest.fixture(scope="module", params=["T1", "T2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(seed_of(f"{request.node.nodeid} {request.param}"))
    shape = getattr(oracle, request.param)
    length = {"T1": 75, "T2": 300}[request.param]
    theirs, ours = _pair(shape, tmp_path_factory.mktemp(request.param))
    ids = _ids(shape, length)
    want = oracle.logits(theirs, ids)
    assert want.abs().max() > 1, "an oracle whose logits are all near zero would prove nothing"
    return ours, ids, want


def test_prefill(pair) -> None:
    ours, ids, want = pair
    _assert_close(ours.forward(ids, chunk=len(ids)), want)


@pytest.mark.parametrize("chunk", [7, 64, pytest.param(1, marks=pytest.mark.long)])
def test_chunked_prefill(pair, chunk: int) -> None:
    ours, ids, want = pair
    _assert_close(ours.forward(ids, chunk=chunk), want)


@pytest.mark.parametrize(
    "decode_from", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 37))]
)
def test_decode(pair, decode_from: int) -> None:
    ours, ids, want = pair
    _assert_close(ours.forward(ids, decode_from=decode_from), want)


@pytest.mark.parametrize("block_size", [1, 3, 16, 200])
def test_any_block_size(pair, block_size: int) -> None:
    ours, ids, want = pair
    _assert_close(ours.forward(ids, chunk=33, block_size=block_size), want)


def test_a_model_saved_in_bf16_throughout(tmp_path: Path) -> None:
    """`model.bfloat16().save_pretrained` also narrows what releases keep in F32: sinks,
    ape, biases, mHC.
    """
    theirs, ours = _pair(oracle.T1, tmp_path, narrow=True)
    ids = _ids(oracle.T1, 40)
    assert next(iter(theirs.state_dict().values())).dtype == torch.bfloat16
    _assert_close(ours.forward(ids), oracle.logits(theirs.float(), ids))


def test_ragged_batch_equals_each_alone(tmp_path: Path) -> None:
    theirs, ours = _pair(oracle.T1, tmp_path)
    prompts = [_ids(oracle.T1, n, seed=n) for n in (1, 3, 4, 5, 31, 64, 75)]
    want = torch.cat([oracle.logits(theirs, p) for p in prompts])
    for chunk in (9, 128):
        _assert_close(ours.forward(prompts, chunk=chunk), want)


def test_edge_lengths(tmp_path: Path) -> None:
    """Around window, block and top-k edges: window 8,
    ratios 4 and 16, top-k 3 (edges at t + 1 = 12 and 16).
    """
    theirs, ours = _pair(oracle.T1, tmp_path, seed=1)
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33):
        ids = _ids(oracle.T1, length, seed=length)
        _assert_close(ours.forward(ids, decode_from=length // 2), oracle.logits(theirs, ids))


@pytest.mark.parametrize("seed", range(16))
def test_random_architectures(seed: int, tmp_path: Path) -> None:
    """Other head counts, ratios, windows, top-k, expert counts, stream counts and odd lengths."""
    shape = oracle.random_shape(seed)
    theirs, ours = _pair(shape, tmp_path, seed)
    pick = random.Random(seed)
    ids = _ids(shape, pick.randint(20, 90), seed)
    want = oracle.logits(theirs, ids)
    _assert_close(ours.forward(ids), want)
    _assert_close(
        ours.forward(ids, chunk=pick.randint(1, 20), decode_from=pick.randint(1, len(ids))), want
    )
