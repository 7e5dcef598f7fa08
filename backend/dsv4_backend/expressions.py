"""Terms of relations: Python expressions over the numbers of a call, compiled for the C++ checker.

Names are dimensions of the specification lines, integer arguments and what `LOCAL` and `FACTS`
add. Operators: ``+ - * // % &``, comparisons (chained too), ``and or not``, ``A if C else B``,
``max(A, B)``; truth is 1 and 0, nothing is left unevaluated, and what divides by 0 is 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsv4_backend.argspec import Term

Step = tuple[str, int]

_OPERATORS: Mapping[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "f", ast.Mod: "%", ast.BitAnd: "&",
    ast.Lt: "<", ast.LtE: "l", ast.Gt: ">", ast.GtE: "g", ast.Eq: "=", ast.NotEq: "#",
    ast.And: "a", ast.Or: "o", ast.USub: "~", ast.Not: "!",
}  # fmt: skip
FACTS = {"given": "g", "rank": "r", "size": "s", "is_e4m3": "8", "positive": "+"}
"""Functions of an argument (`size` of an axis too): is it given, its rank, a size of it,
is it float8_e4m3fn, is the number above 0.
"""
LOCAL = ("new", "length", "position")
"""Of a sequence: its tokens in this call, its tokens in all; of a token: its position."""
_SHOWN = {"sizes": "s", "dtype": "d", "number": "n"}
_OWN = {"value": "v", "index": "i"}


class Fact(NamedTuple):
    """A number that the checker gets from an argument; see csrc/bind/relations.h."""

    name: int
    of: str
    position: int
    axis: int


class Piece(NamedTuple):
    """Text of an error's words, and what is shown behind it; see csrc/bind/relations.h."""

    text: str
    shown: str = " "
    position: int = 0
    term: Term | None = None


class Compiler:
    """Terms and words of one operator's relations.

    numbers: number of every name that its lines bind; places: position of every argument.
    Facts are collected as terms ask for them; `names` counts all names.
    """

    def __init__(self, numbers: Mapping[str, int], places: Mapping[str, int]) -> None:
        self._numbers = dict(numbers) | {n: len(numbers) + i for i, n in enumerate(LOCAL)}
        self._places = places
        self._facts: dict[tuple[str, int, int], Fact] = {}
        self._first_fact = len(self._numbers)

    @property
    def facts(self) -> list[Fact]:
        """What the terms asked of arguments so far."""
        return list(self._facts.values())

    @property
    def names(self) -> int:
        """How many numbers the terms have names for."""
        return self._first_fact + len(self._facts)

    def term(self, text: str) -> Term:
        """The program of an expression;
        ValueError for what is none, or names what is not there.
        """
        try:
            return Term(text, self._steps(ast.parse(text, mode="eval").body))
        except (SyntaxError, LookupError) as error:
            raise ValueError(f"relation: {text!r} is no term: {error}") from error

    def words(self, template: str) -> list[Piece]:
        """Pieces of a template: text with ``{TERM}``, ``{sizes(x)}``, ``{dtype(x)}``,
        ``{number(n)}`` (an integer argument as it is), ``{value}`` and ``{index}``.
        """
        parts = re.split(r"\{([^}]*)\}", template)
        pieces = [self._piece(*pair) for pair in zip(parts[::2], parts[1::2], strict=False)]
        return [*pieces, Piece(parts[-1])]

    def _piece(self, text: str, hole: str) -> Piece:
        if hole in _OWN:
            return Piece(text, _OWN[hole])
        function, _, argument = hole.partition("(")
        if function in _SHOWN and argument.rstrip(")") in self._places:
            return Piece(text, _SHOWN[function], self._places[argument.rstrip(")")])
        return Piece(text, "t", 0, self.term(hole))

    def _steps(self, node: ast.AST) -> list[Step]:
        for kind, steps in _NODES.items():
            if isinstance(node, kind):
                return steps(self, node)
        raise LookupError(f"{type(node).__name__} is not known")

    def _constant(self, node: ast.Constant) -> list[Step]:
        if type(node.value) is not int:
            raise LookupError(f"{node.value!r} is no integer")
        return [("n", node.value)]

    def _name(self, node: ast.Name) -> list[Step]:
        if node.id not in self._numbers:
            raise LookupError(f"no dimension and no integer argument is named {node.id!r}")
        return [("v", self._numbers[node.id])]

    def _operation(self, operator: ast.AST, *operands: ast.AST) -> list[Step]:
        if type(operator) not in _OPERATORS:
            raise LookupError(f"{type(operator).__name__} is not known")
        return self._joined(_OPERATORS[type(operator)], *map(self._steps, operands))

    def _joined(self, operation: str, first: list[Step], *others: list[Step]) -> list[Step]:
        if not others:
            return [*first, (operation, 0)]
        return [*first, *(step for other in others for step in (*other, (operation, 0)))]

    def _comparison(self, node: ast.Compare) -> list[Step]:
        sides = [node.left, *node.comparators]
        pairs = zip(node.ops, sides, sides[1:], strict=False)
        compared = [self._operation(operator, *two) for operator, *two in pairs]
        return compared[0] if len(compared) == 1 else self._joined("a", *compared)

    def _choice(self, node: ast.IfExp) -> list[Step]:
        parts = map(self._steps, (node.orelse, node.body, node.test))
        return [*(step for part in parts for step in part), ("?", 0)]

    def _call(self, node: ast.Call) -> list[Step]:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function == "max" and len(node.args) == 2:
            return self._joined("M", *map(self._steps, node.args))
        if function not in FACTS or len(node.args) != (2 if function == "size" else 1):
            raise LookupError(f"no function of these arguments is named {function!r}")
        return [("v", self._fact(FACTS[function], *node.args))]

    def _fact(self, of: str, argument: ast.AST, axis: ast.AST | None = None) -> int:
        name = argument.id if isinstance(argument, ast.Name) else ""
        if name not in self._places:
            raise LookupError(f"no argument is named {name!r}")
        along = 0 if axis is None else getattr(axis, "value", None)
        if type(along) is not int:
            raise LookupError("an axis is an integer")
        key = of, self._places[name], along
        fact = Fact(self._first_fact + len(self._facts), *key)
        return self._facts.setdefault(key, fact).name


_NODES: Mapping[type[ast.AST], Callable[[Compiler, Any], list[Step]]] = {
    ast.Constant: Compiler._constant,
    ast.Name: Compiler._name,
    ast.BinOp: lambda of, node: of._operation(node.op, node.left, node.right),
    ast.BoolOp: lambda of, node: of._operation(node.op, *node.values),
    ast.UnaryOp: lambda of, node: of._operation(node.op, node.operand),
    ast.Compare: Compiler._comparison,
    ast.IfExp: Compiler._choice,
    ast.Call: Compiler._call,
}


class Symbol:
    """A number that is not known yet: what is computed of it becomes the text of a term."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __str__(self) -> str:
        return self.text

    def _with(self, operator: str, other: object) -> Symbol:
        return Symbol(f"({self} {operator} {other})")

    def __add__(self, other: object) -> Symbol:
        return self if other == 0 else self._with("+", other)

    def __radd__(self, other: object) -> Symbol:
        return self if other == 0 else Symbol(other)._with("+", self)

    def __sub__(self, other: object) -> Symbol:
        return self if other == 0 else self._with("-", other)

    def __mul__(self, other: object) -> Symbol:
        return self if other == 1 else self._with("*", other)

    def __floordiv__(self, other: object) -> Symbol:
        return self if other == 1 else self._with("//", other)

    def __mod__(self, other: object) -> Symbol:
        return self._with("%", other)

    def __neg__(self) -> Symbol:
        return Symbol(self.text[1:] if self.text.startswith("-") else f"-{self}")
