"""Argument specifications: one line per argument, the only place where argument rules stand.

Tensors: ``DTYPES [like ARGUMENT] [DIM, DIM, ...] [in [LOW, HIGH)]``

* DTYPES: names joined by ``|``, from `DTYPES` (``float`` and ``int`` are groups); like: the very
  dtype of ARGUMENT.
* DIM: an integer, a name (bound by its first use, then checked), or a term of them such as
  ``n*(n+2)``, ``d/2`` (exact half) or ``K^32`` (ceiling division). A leading ``...`` stands for any
  number of dimensions.
* LOW, HIGH: integers, names that a dimension binds, ``inf``. Names of integer arguments stand for
  their values, here and in dimensions.

Scalars: ``[a finite number | a number] BOUND`` with ``>= LOW``, ``> LOW``, ``in (LOW, HIGH]``, or
in words ``at least LOW`` and ``LOW to HIGH``; LOW and HIGH are terms as above. Behind it may stand
``that fp32 holds``, and of a number that need not be finite ``, or infinity``. The line itself is
what an error says was expected.

Lines are parsed once, here, and handed to the checker in csrc/bind/specification.cpp, which every
call passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "f64": (torch.float64,),
    "f32": (torch.float32, torch.float64),  # f64 for gradients checked by differences
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "float": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "e4m3": (torch.float8_e4m3fn,),
    "e8m0": (torch.float8_e8m0fnu,),
    "i8": (torch.int8,),
    "u8": (torch.uint8,),
    "i32": (torch.int32,),
    "i64": (torch.int64,),
    "int": (torch.int32, torch.int64),
}

_TENSOR = re.compile(
    r"^(?P<dtypes>[\w|]+)(?: like (?P<like>\w+))? \[(?P<shape>[^\]]*)\]"
    r"(?: in \[(?P<low>-?\w+), ?(?P<high>\w+)\))?$"
)
_SCALAR = re.compile(
    r"^(?:a (?P<finite>finite )?number )?"
    r"(?:(?P<sign>>=|>) (?P<bound>\S+)|at least (?P<least>\S+)|(?P<low>\S+) to (?P<high>\S+)"
    r"|in \((?P<open>\S+), (?P<closed>\S+)\])"
    r"(?P<fp32> that fp32 holds(?(finite)|, or infinity))?$"
)
_TOKEN = re.compile(r"\d+|[A-Za-z_]\w*|[()+*/^]")
_PRECEDENCE = {"+": 1, "*": 2, "/": 2, "^": 2}
_MOST_OPERANDS = 8
_INDEX_DTYPES = {torch.int32, torch.int64}


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor argument must look like."""

    text: str
    dtypes: tuple[torch.dtype, ...]
    like: str | None
    shape: tuple[str, ...]
    any_leading: bool
    low: str | None
    high: str | None

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Parse one line; ValueError names the line when it does not follow the grammar."""
        match = _TENSOR.match(text)
        if match is None:
            expected = "'DTYPES [DIMS]' or 'DTYPES [DIMS] in [LOW, HIGH)'"
            raise ValueError(f"argument specification {text!r} is not {expected}")
        dims = tuple(d.strip() for d in match["shape"].split(",")) if match["shape"].strip() else ()
        any_leading = bool(dims) and dims[0] == "..."
        groups = match["dtypes"].split("|")
        unknown = [name for name in groups if name not in DTYPES]
        if unknown:
            raise ValueError(
                f"argument specification {text!r}: {unknown[0]!r} is none of {', '.join(DTYPES)}"
            )
        dtypes = tuple(dict.fromkeys(t for name in groups for t in DTYPES[name]))
        if match["low"] is not None and not set(dtypes) <= _INDEX_DTYPES:
            raise ValueError(
                f"argument specification {text!r}: only i32 and i64 values have a range"
            )
        shape = dims[1:] if any_leading else dims
        negative = [dim for dim in shape if dim.startswith("-")]
        if negative:
            raise ValueError(f"argument specification {text!r}: no dimension is {negative[0]}")
        ends = [int(end) for end in (match["low"], match["high"]) if _is_number(end)]
        if len(ends) == 2 and ends[0] >= ends[1]:
            raise ValueError(f"argument specification {text!r}: no value lies in this range")
        return cls(text, dtypes, match["like"], shape, any_leading, match["low"], match["high"])


@dataclass(frozen=True)
class ScalarSpec:
    """What the value of one number must be: between `low` and `high` (terms, None for none)."""

    text: str
    low: str | None
    low_open: bool
    high: str | None
    finite: bool
    fp32: bool

    @classmethod
    def parse(cls, text: str) -> ScalarSpec:
        """Parse one line; ValueError names the line when it does not follow the grammar."""
        match = _SCALAR.match(text)
        if match is None:
            expected = (
                "'at least LOW', 'LOW to HIGH', 'a number >= LOW' or 'a number in (LOW, HIGH]'"
            )
            raise ValueError(f"argument specification {text!r} is not {expected}")
        low = match["bound"] or match["least"] or match["low"] or match["open"]
        low_open = match["sign"] == ">" or match["open"] is not None
        high = match["high"] or match["closed"]
        return cls(text, low, low_open, high, bool(match["finite"]), bool(match["fp32"]))


Spec = TensorSpec | ScalarSpec


class Term(NamedTuple):
    """A dimension or bound, and its program: ("n", number),
    ("v", number of a name) or (operator, 0) per step.
    """

    text: str
    program: list[tuple[str, int]]


class TensorRule(NamedTuple):
    """One tensor line as the checker takes it; see csrc/bind/specification.h."""

    name: str
    text: str
    position: int
    optional: bool
    written: bool
    dtypes: list[torch.dtype]
    dtype_of: int
    dtype_of_name: str
    dims: list[Term]
    any_leading: bool
    low: Term | None
    high: Term | None


class ScalarRule(NamedTuple):
    """One scalar line as the checker takes it."""

    name: str
    position: int
    expected: str
    low: Term | None
    low_open: bool
    high: Term | None
    finite: bool
    fp32: bool


class Rules(NamedTuple):
    """All lines of an operator: the names' numbers, (name, position) of its integers, the rules."""

    names: Mapping[str, int]
    integers: list[tuple[int, int]]
    tensors: list[TensorRule]
    scalars: list[ScalarRule]


class Names:
    """Numbers for the names of one operator's terms, in order of appearance."""

    def __init__(self, integers: Sequence[str] = ()) -> None:
        self.numbers: dict[str, int] = {}
        for name in integers:
            self.bind(name)

    def bind(self, name: str) -> int:
        """The number of a name; a new one at its first appearance."""
        return self.numbers.setdefault(name, len(self.numbers))

    def term(self, text: str) -> Term:
        """A term whose names may be new."""
        return Term(text, [self._step(token) for token in _postfix(text)])

    def bound_term(self, text: str | None, line: str) -> Term | None:
        """A bound, whose names must be bound by a dimension: ValueError if one is not."""
        if text is None or text == "inf":
            return None
        unknown = [t for t in _postfix(text) if t[0].isalpha() and t not in self.numbers]
        if unknown:
            raise ValueError(
                f"argument specification {line!r}: "
                f"no dimension and no integer argument is named {unknown[0]!r}"
            )
        return self.term(text)

    def _step(self, token: str) -> tuple[str, int]:
        if token in _PRECEDENCE:
            return token, 0
        if token.lstrip("-").isdigit():
            return "n", int(token)
        return "v", self.bind(token)


def _postfix(text: str) -> list[str]:
    """The tokens of a term with operators behind their operands; ValueError for what is no term."""
    if text.startswith("-") and text[1:].isdigit():
        return [text]
    output: list[str] = []
    waiting: list[str] = []
    for token in _TOKEN.findall(text):
        if token == "(":
            waiting.append(token)
        elif token == ")":
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                raise ValueError(f"argument specification: {text!r} is no dimension")
            waiting.pop()
        elif token in _PRECEDENCE:
            while waiting and _PRECEDENCE.get(waiting[-1], 0) >= _PRECEDENCE[token]:
                output.append(waiting.pop())
            waiting.append(token)
        else:
            output.append(token)
    output += reversed(waiting)
    if "".join(_TOKEN.findall(text)) != text.replace(" ", "") or not _is_program(output):
        raise ValueError(f"argument specification: {text!r} is no dimension")
    return output


def _is_program(postfix: Sequence[str]) -> bool:
    """Whether every operator finds two operands, one value is left,
    and the checker's stack is deep enough.
    """
    depth = 0
    for token in postfix:
        depth += -1 if token in _PRECEDENCE else 1
        if token in ("(", ")") or not 1 <= depth <= _MOST_OPERANDS:
            return False
    return depth == 1


def _is_number(text: str | None) -> bool:
    return text is not None and text.removeprefix("-").isdigit()


def parse(arguments: Mapping[str, str], tensors: Sequence[str]) -> dict[str, Spec]:
    """The parsed lines of an operator; `tensors` names its arguments that are tensors.

    ValueError for a tensor without a line.
    """
    bare = [name for name in tensors if name not in arguments]
    if bare:
        raise ValueError(f"argument specification: tensor {bare[0]!r} has no line")
    kinds: dict[bool, type[TensorSpec] | type[ScalarSpec]] = {True: TensorSpec, False: ScalarSpec}
    return {name: kinds[name in tensors].parse(text) for name, text in arguments.items()}


def rules(
    specs: Mapping[str, Spec],
    parameters: Sequence[str],
    integers: Sequence[str],
    optional: frozenset[str],
    written: Sequence[str],
) -> Rules:
    """The lines as the C++ checker takes them.

    ValueError for a line of an argument that is not there, for `like` such an argument, and for a
    bound or a term of a name that no call is sure to bind.
    """
    for name, line in specs.items():
        if name not in parameters:
            raise ValueError(f"argument specification {line.text!r}: no argument is named {name!r}")
    names = Names(integers)
    tensors = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    dims = {name: [names.term(dim) for dim in spec.shape] for name, spec in tensors.items()}
    _check_bound(tensors, integers, optional)
    place = {name: position for position, name in enumerate(parameters)}
    tensor_rules = []
    for name, spec in tensors.items():
        if spec.like is not None and spec.like not in tensors:
            raise ValueError(
                f"argument specification {spec.text!r}: no tensor is named {spec.like!r}"
            )
        tensor_rules.append(
            TensorRule(
                name,
                spec.text,
                place[name],
                name in optional,
                name in written,
                list(spec.dtypes),
                -1 if spec.like is None else place[spec.like],
                spec.like or "",
                dims[name],
                spec.any_leading,
                names.bound_term(spec.low, spec.text),
                names.bound_term(spec.high, spec.text),
            )
        )
    scalar_rules = [
        ScalarRule(
            name,
            place[name],
            spec.text,
            names.bound_term(spec.low, spec.text),
            spec.low_open,
            names.bound_term(spec.high, spec.text),
            spec.finite,
            spec.fp32,
        )
        for name, spec in specs.items()
        if isinstance(spec, ScalarSpec)
    ]
    bound = [(names.numbers[name], place[name]) for name in integers]
    return Rules(names.numbers, bound, tensor_rules, scalar_rules)


def _check_bound(
    tensors: Mapping[str, TensorSpec], integers: Sequence[str], optional: frozenset[str]
) -> None:
    """ValueError for a name that stands in a term or a range alone:
    the checker would never learn what it is, and pass the argument over.
    """
    lone = {
        dim
        for name, spec in tensors.items()
        if name not in optional
        for dim in spec.shape
        if dim.isidentifier()
    }
    for spec in tensors.values():
        # What an optional tensor binds itself is known wherever its own line is checked.
        known = lone | set(integers) | {dim for dim in spec.shape if dim.isidentifier()}
        ends = [end for end in (spec.low, spec.high) if end not in (None, "inf")]
        for term in (*spec.shape, *filter(None, ends)):
            unknown = [token for token in _postfix(term) if token[0].isalpha()]
            unknown = [token for token in unknown if token not in known]
            if unknown:
                raise ValueError(
                    f"argument specification {spec.text!r}: no dimension of a tensor that is "
                    f"always there and no integer argument is named {unknown[0]!r}"
                )
