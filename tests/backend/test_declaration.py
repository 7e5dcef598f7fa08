"""What an operator's declaration refuses: each is named, and nothing is left half declared."""

import math

import pytest
import torch

from dsv4_backend import OPERATORS
from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.relations import require

SCHEMA = "declared_here(Tensor x, int n, float eps=0.5) -> Tensor"
LINES = {"x": "float [T, d]", "n": "at least 1", "eps": "a finite number > 0 that fp32 holds"}


def reference(x: torch.Tensor, n: int, eps: float = 0.5) -> torch.Tensor:
    """`x`."""
    return x


@pytest.fixture(autouse=True)
def _undeclared():
    yield
    OPERATORS.pop("declared_here", None)


def declare(schema=SCHEMA, lines=LINES, relations=(), of=reference):
    tolerance = Tolerance(reason="of a test")
    decorate = operator(schema, rows=(), arguments=lines, tolerance=tolerance, relations=relations)
    return decorate(of)


def without(name):
    return {other: line for other, line in LINES.items() if other != name}


def test_a_whole_declaration():
    assert declare() is OPERATORS["declared_here"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (without("x"), "tensor 'x' has no line"),
        (without("n"), "number 'n' has neither a line nor a relation"),
        (without("eps"), "number 'eps' has neither a line nor a relation"),
        ({**LINES, "y": "at least 1"}, "no argument is named 'y'"),
        ({**LINES, "y": "float [T]"}, "no argument is named 'y'"),
    ],
)
def test_lines_that_are_missing_or_of_nothing(lines, words):
    with pytest.raises(ValueError, match=words):
        declare(lines=lines)
    assert "declared_here" not in OPERATORS


def test_a_relation_stands_for_the_line_of_a_number():
    declare(lines=without("n"), relations=(require("n", "0 <= n <= d", "{n}", "0 to {d}"),))


@pytest.mark.parametrize(
    "schema",
    [
        "declared_here(Tensor x, float eps=0.5, int n=1) -> Tensor",
        "declared_here(Tensor x, int n, float eps) -> Tensor",
        "declared_here(Tensor x, int n, float eps=0.25) -> Tensor",
        "declared_here(Tensor x, int m, float eps=0.5) -> Tensor",
    ],
)
def test_the_reference_takes_what_the_schema_says(schema):
    with pytest.raises(ValueError, match=r"the reference takes \(x, n, eps=0.5\), expected \(x, "):
        declare(schema)


@pytest.mark.parametrize(
    "limits", [3, (1e-6,), (1e-6, 1e-6, 0), (-1e-6, 0.0), (0.0, math.nan), (math.inf, 0.0)]
)
def test_limits_are_two_numbers(limits):
    with pytest.raises(ValueError, match=r"tolerance of ideal: found .*, expected \(atol, rtol\)"):
        Tolerance("of a test", ideal=limits)


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_tolerance_has_a_reason(reason):
    with pytest.raises(ValueError, match="found no reason"):
        Tolerance(reason)
