"""Which implementation runs where, why, what ran, and how to force another.

`torch.ops.dsv4.<name>` chooses per call: the first candidate of the device whose predicate agrees
with these arguments, else the reference on the same device. The choice is made in C++
(csrc/bind/registry.cpp); this module is its Python face.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from dsv4_backend import _C
from dsv4_backend.argspec import Term
from dsv4_backend.contract import OPERATORS, Operator
from dsv4_backend.expressions import Piece
from dsv4_backend.support import Support, npu_fault

POLICIES = tuple(_C.Policy.__members__)
"""auto: native, else reference. reference: always the reference.
strict: native, else UnsupportedError.
"""
NO_KERNEL = "no kernel for this device in this build"


@dataclass(frozen=True)
class Context:
    """A machine that predicates are asked about, this one or another.

    isa: "portable", "avx2" or "avx512"; chip: "Ascend910B3" or "A2", "" without an NPU; cann:
    "9.1.0"; packages: the operator packages there: "builtin", "vllm-ascend", "recipes".
    """

    isa: str
    chip: str = ""
    cann: str = ""
    packages: tuple[str, ...] = ("builtin",)


@dataclass(frozen=True)
class Candidate:
    """One implementation and what its predicate says of a call: `reason` against it,
    None when it would run.
    """

    name: str
    reason: str | None


@dataclass(frozen=True)
class Launcher:
    """A candidate as it was declared, whatever the arguments.

    kind: "kernel" of this project; "fused", one function of the device's, copies aside; or
    "composite", several. symbols: functions of the device's that it names, all of which it needs.
    """

    operator: str
    device: str
    name: str
    kind: str
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class NpuFunction:
    """A function of CANN's or of another operator package, and where it is.

    documented: where documents place it, in words. expected: the package in which they do on the
    chip and CANN of this process; package: the one whose library has both its phases. Both are
    empty where there is none, as without an NPU.
    """

    symbol: str
    signature: str
    documented: str
    expected: str
    package: str


def register(contract: Operator) -> None:
    """Define `torch.ops.dsv4.<name>` with its checks, reference, fake kernel and autograd."""
    rules = contract.rules()
    tensors = [_C.TensorRule(*map(_in_cpp, rule)) for rule in rules.tensors]
    scalars = [_C.ScalarRule(*map(_in_cpp, rule)) for rule in rules.scalars]
    relations = contract.compiled_relations()
    between = [_C.RelationRule(*map(_in_cpp, rule)) for rule in relations.rules]
    facts = [_C.Fact(*fact) for fact in relations.facts]
    lines = relations.names, rules.integers, tensors, scalars
    checks = contract.check_shapes, contract.check_contents
    _C.define(contract.schema, *lines, relations.new_tokens, facts, between, *checks)
    _reference_library.impl(contract.name, contract.plain_reference, "CompositeImplicitAutograd")
    torch.library.register_fake(f"dsv4::{contract.name}", partial(_fake, contract))


def _in_cpp(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_cpp(item) for item in value]
    if isinstance(value, Piece):
        return _C.Piece(*map(_in_cpp, value))
    return _C.Term(*value) if isinstance(value, Term) else value


def _fake(contract: Operator, *args: Any) -> Any:
    """Shapes and dtypes of the results for tensors without values,
    after the checks that need none.
    """
    _C.check(contract.name, *contract.with_defaults(args))
    return contract.plain_reference(*args)


_reference_library = torch.library.Library("dsv4_reference", "IMPL")


@contextmanager
def use(
    policy: str | None = None,
    *,
    only: str = "",
    check_on_device: bool | None = None,
    check_contents: bool | None = None,
) -> Iterator[None]:
    """Force a policy for this thread: one of `POLICIES`, and one candidate if `only` names it.

    What is None stays as it is, and `only` stays with the policy.
    check_on_device: ranges of ids and indices are checked on device tensors too, at the cost of one
    synchronisation per call; on the CPU they always are, unless check_contents is False.
    check_contents: False reads no value of an argument before an operator runs (ids, offsets,
    lengths, block tables, slots, NaN), for an engine that vouches for them; shapes, dtypes and
    overlaps of memory are checked all the same. A wrong value then has no promised result: a
    reference indexes with torch, which raises IndexError outside a tensor but counts some negative
    indices from its end, and an absent block (-1) reads as rows that are not there. A native kernel
    has to stay inside its tensors by itself, as on a device, where no value is checked either.
    """
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    before = _C.choice()
    on_device = before.check_on_device if check_on_device is None else check_on_device
    contents = before.check_contents if check_contents is None else check_contents
    if check_on_device and not contents:
        raise ValueError("check_on_device: found True, expected False where contents are unchecked")
    if policy is None:
        chosen, only = before.policy, only or before.only
    else:
        chosen = getattr(_C.Policy, policy)
    _C.set_choice(_C.Choice(chosen, only, on_device, contents))
    try:
        yield
    finally:
        _C.set_choice(before)


class Derived(NamedTuple):
    """A value that launchers derive from tensors of a step: its name, those tensors, numbers.

    "count of all rows" of nothing and [rows, index of the device]: int64 [1] that holds rows.
    "entry lengths" of (seq_lens) and [ratio]: seq_lens // ratio and seq_lens % ratio, int32 [R]
    each. "tokens before" of (query_start_loc, seq_lens): seq_lens less the step's own tokens, int32
    [R]. "slots in int32" of (slots). "joined rotation" of what `qkv_norm_rope`, and "joined
    rotation of the indexer" of what `indexer_prolog_int8` is turned by, and [heads]: a row of cos
    and of sin for each row of their buffer, fp32 [rows, r] each: queries by head, keys, entries.
    """

    name: str
    of: Sequence[torch.Tensor]
    numbers: Sequence[int] = ()


@contextmanager
def step(known: Iterable[tuple[Derived, Sequence[torch.Tensor]]] = ()) -> Iterator[None]:
    """Around one step of a network, on the thread that runs it: what launchers derive from its
    lengths (metadata of attention, lengths of entries) is made once and shared by all layers.

    known: values that are there already. While the step runs nobody writes the tensors that are
    derived from. Without a step every call makes them for itself.
    """
    kept = _C.Step()
    for (name, of, numbers), values in known:
        kept.give(name, list(of), list(numbers), list(values))
    before = _C.open_step(kept)
    try:
        yield
    finally:
        _C.open_step(before)


def candidates(
    name: str, *args: Any, device: str | None = None, context: Context | None = None, **kwargs: Any
) -> list[Candidate]:
    """Every candidate of `torch.ops.dsv4.<name>` on a device, best first,
    with what it says of these arguments.

    device: "cpu" or "npu" asks for that one whatever the arguments are on; None for the
    first tensor's.
    """
    if name not in OPERATORS:
        raise KeyError(f"dsv4::{name} is not an operator; `dsv4-ascend ops` lists them")
    device = device or device_of((*args, *kwargs.values()))
    where = None
    if context is not None:
        where = _C.Context(context.isa, context.chip, context.cann, list(context.packages))
    return [Candidate(*answer) for answer in _C.answers(name, device, where, *args, **kwargs)]


def device_of(arguments: Iterable[Any]) -> str:
    """Device type of the first tensor among the arguments of a call, "cpu" without one."""
    tensors = (value for value in arguments if isinstance(value, torch.Tensor))
    return next((tensor.device.type for tensor in tensors), "cpu")


def support(
    name: str, *args: Any, device: str | None = None, context: Context | None = None, **kwargs: Any
) -> Support:
    """Would a native kernel run `torch.ops.dsv4.<name>(*args, **kwargs)`, and if not, why?

    device, context: as in `candidates`; without a context the device must be there. The reason
    names the candidate that would run, or what the last candidate, which asks for least, misses.
    """
    device = device or device_of((*args, *kwargs.values()))
    fault = npu_fault() if device == "npu" and context is None else None
    if fault is not None:
        return Support(False, fault)
    answers = candidates(name, *args, device=device, context=context, **kwargs)
    chosen = next((answer for answer in answers if answer.reason is None), None)
    if chosen is not None:
        return Support(True, chosen.name)
    return Support(False, answers[-1].reason or "" if answers else NO_KERNEL)


def native_kernels() -> dict[tuple[str, str], tuple[str, ...]]:
    """(operator, device type) -> names of its candidates, best first, in this build."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in launchers():
        key = one.operator, one.device
        found[key] = (*found.get(key, ()), one.name)
    return found


def launchers() -> list[Launcher]:
    """Every candidate of this build, those of an operator and device best first."""
    return [Launcher(*row[:-1], symbols=tuple(row[-1])) for row in _C.candidates()]


def npu_functions() -> list[NpuFunction]:
    """Every function that a launcher of this build names, looked up now."""
    return [NpuFunction(*row) for row in _C.npu_functions()]


def npu_packages() -> list[str]:
    """Operator packages that this process can use: of "builtin", "vllm-ascend" and "recipes"."""
    return _C.npu_packages()


def ran() -> dict[tuple[str, str], dict[str, int]]:
    """(operator, device type) -> implementation -> how often it ran
    in this process since `forget_ran`.
    """
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for op, device, implementation, times in _C.ran():
        counts.setdefault((op, device), {})[implementation] = times
    return counts


def forget_ran() -> None:
    """Set the counts of `ran` to zero."""
    _C.forget_ran()
