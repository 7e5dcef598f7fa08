"""What would make it fit, and what would make it faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dsv4_ascend.plan.formats import PRECISIONS, precision_named, weight_bytes
from dsv4_ascend.plan.numbers import Numbers
from dsv4_ascend.plan.question import MOST_DEVICES, Question
from dsv4_ascend.plan.search import Candidate, Judge
from dsv4_ascend.plan.times import Step
from dsv4_backend.errors import ArgumentError

_RATES = ("bf16_tflops", "int8_tops", "fp8_tflops")


@dataclass(frozen=True)
class WhatIf:
    """A change, how to ask for it, and the decode step with it."""

    name: str
    option: str
    step: Step


def _twice(*keys: str) -> Callable[[Numbers], Numbers]:
    return lambda numbers: numbers.times(**{key: 2.0 for key in keys if key in numbers})


_CHANGES: dict[str, tuple[str, Callable[[Numbers], Numbers]]] = {
    "twice the memory bandwidth": ("--set hbm_gbps=2x", _twice("hbm_gbps")),
    "twice the compute": ("--set RATE=2x, for bf16 and 8 bits", _twice(*_RATES)),
    "twice the fabric": ("--set link_gbps=2x", _twice("link_gbps")),
    "half the launch gap": ("--set gap_us=0.5x", lambda n: n.times(gap_us=0.5)),
    "exchange under the experts": (
        "--set exchange_overlap=1", lambda n: n.changed(["exchange_overlap=1"]),
    ),
    "no captured graph": ("--no-graph", lambda n: n.as_if("gap_us", "eager_us", "--no-graph")),
}  # fmt: skip


def what_ifs(candidate: Candidate) -> list[WhatIf]:
    """The decode step of a layout after each change that can matter."""
    question = candidate.question
    found = []
    for name, (option, change) in _CHANGES.items():
        if option == "--no-graph" and not question.graph:
            continue
        changed = change(question.numbers)
        found.append(WhatIf(name, option, candidate.decode_at(candidate.memory.per_group, changed)))
    return found


def ways_to_fit(question: Question) -> Iterator[str]:
    """Changes of one option after which some layout fits; the smallest of each kind."""
    kinds = (_layout, _precision, _batch, _buffers, _count, _context)
    for kind in kinds:
        for words, changed in kind(question):
            if _fits(changed):
                yield words
                break


def _fits(question: Question) -> bool:
    return any(one.feasible for one in _judged(question))


def _judged(question: Question) -> list[Candidate]:
    judge = Judge.of(question)
    return [judge.candidate(question.layout)] if question.layout else judge.candidates()


Changes = Iterator[tuple[str, Question]]


def _layout(question: Question) -> Changes:
    if question.layout:
        yield "another layout (without --layout the search chooses)", replace(question, layout=None)


def _precision(question: Question) -> Changes:
    now = weight_bytes(question.shapes, question.precision)
    for name in PRECISIONS:
        try:
            other = precision_named(name, question.device, question.numbers)
        except ArgumentError:
            continue
        if weight_bytes(question.shapes, other).experts < now.experts:
            yield f"--precision {name}", replace(question, precision=other)
            for words, fewer in _batch(replace(question, precision=other)):
                yield f"--precision {name} {words}", fewer


def _most(least: int, below: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [least, below) that fits, where smaller ones do too; else `least`."""
    while below - least > 1:
        middle = (least + below) // 2
        least, below = (middle, below) if fits(middle) else (least, middle)
    return least


def _batch(question: Question) -> Changes:
    if question.batch > 1 and _fits(replace(question, batch=1)):
        batch = _most(1, question.batch, lambda n: _fits(replace(question, batch=n)))
        yield f"--batch {batch}", replace(question, batch=batch)


def _buffers(question: Question) -> Changes:
    size = question.numbers["comm_mib"] / 4
    if size >= 1:
        change = f"comm_mib={size:g}"
        yield f"--set {change} (HCCL_BUFFSIZE)", question.with_numbers([change])


def _count(question: Question) -> Changes:
    """More devices; a layout that was asked for gets more groups."""
    unit = int(question.numbers["node_devices"])
    of_a_node = [1 << i for i in range(unit.bit_length()) if 1 << i < unit]
    for count in (*of_a_node, *(unit * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128))):
        if question.count < count <= MOST_DEVICES:
            yield f"--count {count}", replace(question, count=count, layout=None)


def _context(question: Question) -> Changes:
    context = question.context
    while context > 1024:
        context //= 2
        yield f"--context {context}", replace(question, context=context)
