"""Relations between the arguments of an operator that no specification line can say, as data.

A contract lists them; csrc/bind/relations.h checks them before every call, without Python:

    relations=(
        require("x", "K % 2 == 0", "{K} channels", "an even number, two codes per byte"),
        batch(),
    )

Relations between sizes and integers (`require`) hold for every call; the others read values, of
host tensors only and not under `dispatch.use(check_contents=False)`. They are checked in the order
of the list. Terms and words in braces: `expressions`. A kind that is missing here is a Python
function: `Operator.shapes`, `Operator.contents`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv4_backend.argspec import Spec, TensorSpec, Term
from dsv4_backend.expressions import Compiler, Fact, Piece

_INTEGERS = {torch.int32, torch.int64}
_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


class Shape(NamedTuple):
    """What an argument of a relation must be: ranks and dtypes that its line may give it."""

    words: str
    ranks: tuple[int, ...]
    dtypes: set[torch.dtype]

    def fits(self, spec: Spec | None) -> bool:
        """Whether every tensor that fits the line is one."""
        if not isinstance(spec, TensorSpec):
            return False
        return (
            not spec.any_leading
            and len(spec.shape) in self.ranks
            and (not self.dtypes or self.dtypes.issuperset(spec.dtypes))
        )


_VECTOR = Shape("int [n]", (1,), _INTEGERS)
_MATRIX = Shape("int [rows, columns]", (2,), _INTEGERS)
_VALUES = Shape("int of one or two dimensions", (1, 2), _INTEGERS)
_NUMBERS = Shape("float of one or two dimensions", (1, 2), _FLOATS)
_ROWS = Shape("float [rows, columns]", (2,), _FLOATS)
_PAGES = Shape("a cache [num_blocks, block_size, ...]", (2, 3, 4), set())
_ANY = None

KINDS: Mapping[str, tuple[int, tuple[Shape | None, ...]]] = {
    "require": (1, (_ANY,)),
    "batch": (1, (_VECTOR, _VECTOR)),
    "table": (3, (_MATRIX, _PAGES, _VECTOR, _VECTOR)),
    "bound": (1, (_ANY, _VECTOR)),
    "range": (2, (_VALUES,)),
    "looked_up": (2, (_MATRIX, _VECTOR)),
    "of_tokens": (2, (_MATRIX, _VECTOR, _VECTOR)),
    "distinct": (0, (_VECTOR,)),
    "distinct_rows": (0, (_MATRIX, _PAGES, _VECTOR, _VECTOR)),
    "offsets": (1, (_VECTOR,)),
    "trailing": (0, (_MATRIX,)),
    "finite": (0, (_NUMBERS,)),
    "positive": (1, (_NUMBERS,)),
    "bf16": (0, (_NUMBERS,)),
    "numbers": (0, (_ROWS, _VECTOR)),
    "finite_largest": (0, (_ROWS,)),
}
"""Kind -> how many terms it has, and what its arguments must be."""


@dataclass(frozen=True)
class Relation:
    """One relation: its kind, arguments, terms, an error's words,
    and what it says in words (for pages).

    The first argument is the one that errors name. ValueError for a kind that is none, and for
    another number of arguments or terms than it has.
    """

    kind: str
    arguments: tuple[str, ...]
    terms: tuple[str, ...]
    found: str
    expected: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"relation: {self.kind!r} is none of {', '.join(KINDS)}")
        terms, shapes = KINDS[self.kind]
        if (len(self.terms), len(self.arguments)) != (terms, len(shapes)):
            raise ValueError(
                f"relation {self.kind!r} of {self.arguments} with terms {self.terms}: it has "
                f"{len(shapes)} arguments and {terms} terms"
            )

    @property
    def reads_values(self) -> bool:
        """Whether values of tensors are read."""
        return self.kind != "require"

    @property
    def words(self) -> str:
        """What is expected of the first argument, for a reader."""
        return self.text or re.sub(r"\{([^}]*)\}", r"\1", self.expected)


class RelationRule(NamedTuple):
    """A relation as the checker takes it; see csrc/bind/relations.h."""

    kind: str
    names: list[str]
    positions: list[int]
    terms: list[Term]
    found: list[Piece]
    expected: list[Piece]


class Compiled(NamedTuple):
    """All relations of an operator as the checker takes them:
    how many names terms have, the first of those of a sequence, and facts.
    """

    names: int
    new_tokens: int
    facts: list[Fact]
    rules: list[RelationRule]


def compiled(
    relations: Sequence[Relation],
    specs: Mapping[str, Spec],
    parameters: Sequence[str],
    numbers: Mapping[str, int],
) -> Compiled:
    """The relations as the C++ checker takes them; ValueError for one that does not fit."""
    places = {name: place for place, name in enumerate(parameters)}
    compiler = Compiler(numbers, places)
    rules = []
    for relation in relations:
        _check_arguments(relation, specs, parameters)
        rules.append(
            RelationRule(
                relation.kind,
                list(relation.arguments),
                [places[name] for name in relation.arguments],
                [compiler.term(term) for term in relation.terms],
                compiler.words(relation.found),
                compiler.words(relation.expected),
            )
        )
    return Compiled(compiler.names, len(numbers), compiler.facts, rules)


def _check_arguments(
    relation: Relation, specs: Mapping[str, Spec], parameters: Sequence[str]
) -> None:
    for name, shape in zip(relation.arguments, KINDS[relation.kind][1], strict=True):
        if name not in parameters:
            raise ValueError(f"relation {relation.kind!r}: no argument is named {name!r}")
        if shape is not None and not shape.fits(specs.get(name)):
            line = getattr(specs.get(name), "text", None)
            raise ValueError(
                f"relation {relation.kind!r}: the line of {name!r}, {line!r}, is not {shape.words}"
            )


_LENGTHS = ("query_start_loc", "seq_lens")


def require(argument: str, condition: str, found: str, expected: str, text: str = "") -> Relation:
    """A condition on sizes, integers, and what is given; it holds where it names a size
    that is not there (of an argument left out, or a symbol).
    """
    return Relation("require", (argument,), (condition,), found, expected, text)


def given_if(
    argument: str, condition: str, expected: str, found: tuple[str, str] = ("a tensor", "None")
) -> tuple[Relation, Relation]:
    """An optional argument that is given exactly if the condition holds.

    expected: with ``{}`` for what is expected, if it is to be said. found: words for an argument
    that is given, and for one that is not.
    """
    text = f"given exactly if {condition}"
    needed = f"given({argument}) or not {condition}"
    return (
        absent_unless(argument, condition, expected, found[0], text),
        require(argument, needed, found[1], expected.format("a tensor"), text),
    )


def absent_unless(
    argument: str, condition: str, expected: str, found: str = "a tensor", text: str = ""
) -> Relation:
    """An optional argument that is given only if the condition holds; `expected` as above."""
    only_then = f"not given({argument}) or {condition}"
    text = text or f"None unless {condition}"
    return require(argument, only_then, found, expected.format("None"), text)


def batch(tokens: str = "T") -> Relation:
    """query_start_loc [R+1] starts at 0, never falls and ends at `tokens`;
    seq_lens [R] count these tokens too.
    """
    text = f"offsets from 0 to {tokens} that never fall, of no more tokens than `seq_lens` counts"
    return Relation("batch", _LENGTHS, (tokens,), "", "", text)


def paged(cache: str, sizes: str = "num_blocks block_size columns") -> Relation:
    """Sizes of a cache and the columns of its block table, by name: at least one of each."""
    blocks, rows, columns = sizes.split()
    return require(
        cache,
        f"{blocks} >= 1 and {rows} >= 1 and {columns} >= 1",
        f"cache {{sizes({cache})}} with {{{columns}}} columns",
        "at least one block, one row per block and one column",
    )


ONE_MORE_OFFSET = require(
    "query_start_loc", "S == R + 1", "{S} offsets", "{R + 1} (R + 1)", "R + 1 offsets"
)
"""Offsets [S] of as many sequences as block tables and lengths [R] have."""


def absolute(table: str, rows: str, sizes: str = "block_size columns") -> Relation:
    """A block table with columns for `rows` rows, so that it is no ring."""
    size, columns = sizes.split()
    found = f"{{{columns}}} columns of {{{size}}} rows"
    expected = f"an absolute table, of at least {{{rows}}} rows"
    return require(table, f"{columns} * {size} >= {rows}", found, expected)


def table(name: str, cache: str, first: str, after: str, *, first_block: int = 0) -> Relation:
    """Indices first .. after - 1 of every sequence have distinct rows of a cache,
    in blocks of the cache from first_block on. Terms know `new` and `length`.
    """
    blocks = "block" if first_block == 0 else f"block from {first_block} on"
    text = f"a {blocks} of `{cache}` for every index from `{first}` to before `{after}`"
    text += " of a sequence of `length` tokens, `new` of them in this call"
    terms = first, after, str(first_block)
    return Relation("table", (name, cache, *_LENGTHS), terms, "", "", text)


def entries(name: str, cache: str, ratio: str = "ratio") -> Relation:
    """A table whose every compressed entry of a sequence with tokens is there."""
    return table(name, cache, "0", f"length // {ratio} if new > 0 else 0")


def bound(most: str = "max_seq_len") -> Relation:
    """An integer that no seq_lens exceeds."""
    return Relation("bound", (most, "seq_lens"), (most,), "", "", "at least every `seq_lens`")


def values_in(argument: str, low: str, high: str, expected: str) -> Relation:
    """Integers in [low, high)."""
    return Relation("range", (argument,), (low, high), "{value} at {index}", expected)


def looked_up_in(argument: str, rows: str, low: str, high: str, expected: str) -> Relation:
    """Integers in [low, high), in those rows of a table that `rows` names."""
    found = "{value} at {index}"
    text = f"{expected}, in the rows that `{rows}` names"
    return Relation("looked_up", (argument, rows), (low, high), found, expected, text)


def of_tokens_in(argument: str, low: str, high: str, expected: str) -> Relation:
    """Integers in [low, high) in the row of every token; terms know its `position`."""
    arguments = (argument, *_LENGTHS)
    return Relation("of_tokens", arguments, (low, high), "{value} at {index}", expected)


def slots_in(capacity: str, *, once: bool) -> list[Relation]:
    """`slots` [M] below the capacity or -1; each once, if they are written."""
    inside = values_in("slots", "-1", capacity, f"-1 or a slot in [0, {{{capacity}}})")
    return [inside, distinct("slots", "every slot once")] if once else [inside]


def distinct(argument: str, expected: str) -> Relation:
    """Values [n] of which none that is not negative stands twice."""
    return Relation("distinct", (argument,), (), "{value} more than once", expected)


def distinct_rows(name: str, cache: str) -> Relation:
    """A block table that gives each token of the call a row of the cache of its own."""
    text = f"distinct rows of `{cache}` for the tokens of a call"
    arguments = (name, cache, *_LENGTHS)
    found = "cache row {value} written twice"
    return Relation("distinct_rows", arguments, (), found, "distinct rows", text)


def covered(stack: str, rows: str) -> tuple[Relation, Relation]:
    """At least one expert in `stack` [E, ...]; expert_offsets [E+1] that cover the `rows` rows."""
    experts = require(stack, "E >= 1", f"shape {{sizes({stack})}}", "at least 1 expert")
    expected = f"offsets from 0 to the number of rows {{{rows}}}, never falling"
    return experts, Relation("offsets", ("expert_offsets",), (rows,), "{value}", expected)


def trailing(argument: str) -> Relation:
    """-1 only behind all entries of a row."""
    found = "-1 at {index} before an entry"
    return Relation("trailing", (argument,), (), found, "-1 behind all entries of a row")


def finite(argument: str, found: str) -> Relation:
    """No NaN and no infinity."""
    return Relation("finite", (argument,), (), found, "finite values")


def positive(argument: str, when: str) -> Relation:
    """Values above 0, where the term `when` is true."""
    text = f"values > 0 if {when}"
    return Relation("positive", (argument,), (when,), "{value} at {index}", "values > 0", text)


def held_by_bf16(argument: str) -> Relation:
    """Values that bf16 holds, NaN among them."""
    return Relation("bf16", (argument,), (), "{value}", "values that bf16 holds")


def numbers(argument: str, counts: str) -> Relation:
    """No NaN among the first counts[t] values of row t."""
    expected = "numbers or infinities where visible"
    return Relation("numbers", (argument, counts), (), "NaN at {index}", expected)


def finite_largest(argument: str) -> Relation:
    """Rows without NaN and +inf, each with a finite value."""
    found = "largest logit {value} in row {index}"
    expected = "no NaN, no +inf and a finite logit in every row"
    return Relation("finite_largest", (argument,), (), found, expected)
