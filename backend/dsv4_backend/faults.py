"""Named faults: mutants of a reference that its parity cases must tell from the oracle,
in one dialect.

    rms_norm.wrong_arguments(
        {"epsilon left out": {"eps": 0.0}, "weight + 1": {"weight": lambda w: w + 1}}
    )
    hc_pre.wrong_results({"comb transposed": {"comb": lambda comb: comb.mT}})
    hc_pre.wrong_step(sinkhorn, {"softmax alone": lambda logits, rounds, eps: logits.softmax(-1)})
    topk_indices.no_output_fault("one NaN", "indices are integers")

Each table maps names of faults to edits. Every output has the faults of `OUTPUT_FAULTS` without
being asked. What no edit of arguments, results or steps can say is a function of the arguments:
`@rms_norm.fault("sum instead of mean")`.
"""

from __future__ import annotations

import inspect
import types
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Function = Callable[..., Any]
Edit = Callable[..., Any]
Edits = Mapping[str, Any] | Edit
"""New values by name (a function gets the old value: never None, and each tensor of a list),
or a function of all.
"""
Steps = Mapping[Function, Function]

_PACKAGE = __name__.partition(".")[0]


def _last_token_zero(y: torch.Tensor) -> None:
    y[-1:] = 0


def _stale_tail(y: torch.Tensor) -> None:
    y[..., -max(1, y.shape[-1] // 8) :] = 3 if y.is_floating_point() else 1


def _one_nan(y: torch.Tensor) -> None:
    if y.numel() and y.dtype == torch.uint8:  # FP8 and E8M0 codes: all ones is NaN in both
        y.view(-1)[y.numel() // 2] = 255
    elif y.numel() and y.is_floating_point():
        y.view(-1)[y.numel() // 2] = torch.nan


def _tokens_shifted(y: torch.Tensor) -> None:
    y.copy_(y.roll(1, dims=0))


OUTPUT_FAULTS: dict[str, Callable[[torch.Tensor], None]] = {
    "last token zero": _last_token_zero,
    "stale tail of channels": _stale_tail,
    "one NaN": _one_nan,
    "tokens shifted by one": _tokens_shifted,
}
"""Edits in place of an output [T, ...], or of the bytes of one in FP8 or E8M0;
integers hold no NaN.
"""


def on_bytes(
    edit: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit of the bytes of a tensor of one-byte elements, as FP8, E8M0 and packed FP4 are."""
    return lambda t: edit(t.contiguous().view(torch.uint8)).to(torch.uint8).view(t.dtype)


class Faults:
    """The named faults of one reference; base of `contract.Operator`."""

    def __init__(self, schema: str, reference: Function) -> None:
        self._run = reference
        parameters = inspect.signature(reference).parameters
        self._names = tuple(parameters)
        defaults = [
            p.default for p in parameters.values() if p.default is not inspect.Parameter.empty
        ]
        self._named: Callable[..., Any] = namedtuple("Arguments", self._names, defaults=defaults)  # type: ignore[misc]
        returns = torch._C.parse_schema(schema).returns
        self._outputs = tuple(r.name or f"output {i}" for i, r in enumerate(returns))
        self._faults: dict[str, Function] = {}
        self.output_faults = dict(_output_faults(reference, self._outputs))
        self.left_out: dict[str, str] = {}
        """Output faults that make no sense here -> why."""

    def fault(self, name: str) -> Callable[[Function], Function]:
        """Decorator: a mutant of the whole reference; ValueError for a name that is taken."""

        def add(mutant: Function) -> Function:
            if name in self._faults or name in self.output_faults:
                raise self._wrong(name, "is defined twice")
            self._faults[name] = mutant
            return mutant

        return add

    def wrong_arguments(self, faults: Mapping[str, Edits]) -> None:
        """Faults that are the reference of other arguments.

        An edit maps names of arguments to new values, or is a function of all arguments, as a named
        tuple, that returns them. ValueError for an argument that is not there.
        """
        for name, edit in faults.items():
            change = self._change(name, edit, self._names)
            self.fault(name)(lambda *args, change=change: self._run(*change(self._named(*args))))

    def wrong_results(self, faults: Mapping[str, Edits]) -> None:
        """Faults that edit what the reference returns.

        An edit maps names of the schema's outputs to new values, or is a function of the arguments,
        as a named tuple, and of every output, that returns the outputs. ValueError for an output
        that is not there.
        """
        for name, edit in faults.items():
            if callable(edit):
                self.fault(name)(
                    lambda *a, edit=edit: edit(self._named(*a), *_outputs(self._run(*a)))
                )
                continue
            self._check_names(name, edit, self._outputs)
            edits = [edit.get(output, _same) for output in self._outputs]
            self.fault(name)(
                lambda *a, edits=edits: tuple(map(_edited, _outputs(self._run(*a)), edits))
            )

    def wrong_steps(self, faults: Mapping[str, Steps]) -> None:
        """Faults that replace functions which the reference calls, directly or not.

        A replacement may call the function that it replaces. ValueError for one that the reference
        does not call.
        """
        for name, steps in faults.items():
            try:
                self.fault(name)(replace_steps(self._run, steps))
            except LookupError as error:
                raise self._wrong(name, str(error)) from error

    def wrong_step(self, step: Function, faults: Mapping[str, Function]) -> None:
        """Faults that replace the same function; see `wrong_steps`."""
        self.wrong_steps({name: {step: replacement} for name, replacement in faults.items()})

    def no_output_fault(self, name: str, why: str) -> None:
        """Leave out an output fault that changes nothing here;
        ValueError when there is none of that name.
        """
        if name not in self.output_faults:
            raise self._wrong(
                name, f"is no output fault; there are {', '.join(self.output_faults)}"
            )
        self.left_out[name] = why

    def all_faults(self) -> dict[str, Function]:
        """Output faults that are not left out, then the others."""
        return {
            n: f for n, f in self.output_faults.items() if n not in self.left_out
        } | self._faults

    def left_out_faults(self) -> dict[str, Function]:
        """Output faults that are left out: no case may tell them from the oracle."""
        return {name: self.output_faults[name] for name in self.left_out}

    def _change(self, name: str, edit: Edits, known: tuple[str, ...]) -> Edit:
        if callable(edit):
            return edit
        self._check_names(name, edit, known)
        return lambda record: record._replace(
            **{n: _edited(getattr(record, n), e) for n, e in edit.items()}
        )

    def _check_names(self, fault: str, edit: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name in set(edit) - set(known):
            raise self._wrong(fault, f"edits {name!r}; there are {', '.join(known)}")

    def _wrong(self, fault: str, why: str) -> ValueError:
        return ValueError(f"{self._run.__module__}.{self._run.__name__}: fault {fault!r} {why}")


def _same(value: Any) -> Any:
    return value


def _outputs(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else () if result is None else (result,)


def _edited(value: Any, edit: Any) -> Any:
    if not callable(edit):
        return edit
    if isinstance(value, list | tuple):
        return [edit(item) for item in value]
    return None if value is None else edit(value)


def _output_faults(reference: Function, outputs: tuple[str, ...]) -> Iterator[tuple[str, Function]]:
    """The first output's faults have plain names, the others' begin with the output's name."""
    for place, output in enumerate(outputs):
        for name, edit in OUTPUT_FAULTS.items():
            yield name if place == 0 else f"{output}: {name}", _with_output(reference, place, edit)


def _with_output(reference: Function, place: int, edit: Callable[[torch.Tensor], None]) -> Function:
    def mutant(*args: Any) -> Any:
        outputs = list(_outputs(reference(*args)))
        outputs[place] = outputs[place].clone(memory_format=torch.contiguous_format)
        edit(
            outputs[place].view(torch.uint8)
            if "float8" in str(outputs[place].dtype)
            else outputs[place]
        )
        return tuple(outputs)

    return mutant


def replace_steps(function: Function, steps: Steps) -> Function:
    """`function` over copies of all functions of this package that it reaches by name,
    with others for some.

    steps: the function to be replaced -> what runs instead. LookupError for one that is not
    reached. Functions of operators and functions of modules are reached as `name.reference`
    and `module.name`.
    """
    copies: dict[Function, Function] = {}

    def copy_of(original: Any) -> Any:
        if original not in copies:
            copies[original] = steps.get(original) or linked(original)
        return copies[original]

    def linked(original: types.FunctionType) -> Function:
        space = dict(original.__globals__)
        copy = types.FunctionType(
            original.__code__, space, original.__name__, original.__defaults__, original.__closure__
        )
        copies[original] = copy
        names = set(_names(original.__code__))
        for name in names & set(space):
            space[name] = in_place_of(space[name], names)
        return copy

    def in_place_of(value: Any, names: set[str]) -> Any:
        if _is_ours(value):
            return copy_of(value)
        if isinstance(value, Faults):
            return types.SimpleNamespace(reference=copy_of(value._run))
        if isinstance(value, types.ModuleType) and value.__name__.startswith(_PACKAGE):
            held = vars(value)
            copied = {n: copy_of(v) for n, v in held.items() if n in names and _is_ours(v)}
            return types.SimpleNamespace(**held | copied)
        return value

    mutant: Function = copy_of(function)
    for missing in set(steps) - set(copies):
        raise LookupError(f"replaces {missing.__name__}, which the reference does not call")
    return mutant


def _is_ours(value: object) -> bool:
    return isinstance(value, types.FunctionType) and value.__module__.startswith(_PACKAGE)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
