"""Argument lines: the grammar, what is an error at declaration,
and what the one checker says of a call.
"""

import pytest
import torch

from dsv4_backend import OPERATORS, argspec
from dsv4_backend.argspec import ScalarSpec, TensorSpec
from dsv4_backend.errors import ArgumentError


def rules(lines, parameters, integers=()):
    specs = argspec.parse(lines, [name for name in parameters if name not in integers])
    return argspec.rules(specs, parameters, integers, frozenset(), ())


@pytest.mark.parametrize(
    "line", ["float", "float [T", "float32 T]", "float [T] in [0, n]", "float [T] in 0, n"]
)
def test_what_is_no_tensor_line(line):
    with pytest.raises(ValueError, match="argument specification"):
        TensorSpec.parse(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("f31 [T]", "'f31' is none of f64, f32"),
        ("float [T,, d]", "'' is no dimension"),
        ("float [-1]", "no dimension is -1"),
        ("float [T, ..., d]", "'...' is no dimension"),
        ("int [T] in [5, 5)", "no value lies in this range"),
    ],
)
def test_a_line_that_says_nothing_is_named(line, words):
    with pytest.raises(ValueError, match="argument specification") as caught:
        rules({"x": line}, ["x"])
    assert repr(line) in str(caught.value) or words.startswith(("''", "'..."))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "line", ["", "positive", ">= 0 and < 3", "1 until 5", "a number in [0, 1]", "at most 3"]
)
def test_what_is_no_scalar_line(line):
    with pytest.raises(ValueError, match="argument specification"):
        ScalarSpec.parse(line)


def test_floats_have_no_range():
    with pytest.raises(ValueError, match="only i32 and i64"):
        TensorSpec.parse("float [T] in [0, n)")


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ({"ids": "int [T] in [0, num_experts)"}, "num_experts"),
        ({"x": "float [T, d]", "ids": "int [T] in [0, D)"}, "'D'"),
        ({"x": "float [T, d]", "k": "1 to E"}, "'E'"),
        ({"x": "float like y [T, d]"}, "'y'"),
        ({"x": "float [q*2, d]"}, "'q'"),
        ({"x": "float [T]", "w": "float [n*(n+2)]", "k": "1 to T"}, "'n'"),
    ],
)
def test_unknown_names_are_errors_at_declaration(lines, word):
    with pytest.raises(ValueError, match=word):
        rules(lines, list(lines), ["k"] if "k" in lines else [])


@pytest.mark.parametrize("other", ["float [E*2]", "i32 [T] in [0, E)"])
def test_what_an_optional_tensor_binds_others_do_not_use(other):
    """Without it the checker would not know the name, and pass over what stands in its terms."""
    lines = {"w": "float [E]", "x": other, "y": "float [T]"}
    specs = argspec.parse(lines, list(lines))
    argspec.rules(specs, list(lines), [], frozenset(), ())
    with pytest.raises(ValueError, match="'E'"):
        argspec.rules(specs, list(lines), [], frozenset({"w"}), ())


def test_every_tensor_has_a_line():
    with pytest.raises(ValueError, match="tensor 'w' has no line"):
        argspec.parse({"x": "float [T]"}, ["x", "w"])


def test_a_line_has_an_argument():
    specs = argspec.parse({"x": "float [T]", "y": "float [T]"}, ["x", "y"])
    with pytest.raises(ValueError, match="no argument is named 'y'"):
        argspec.rules(specs, ["x"], [], frozenset(), ())


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("a finite number > 0 that fp32 holds", True),
        ("a number > 0 that fp32 holds, or infinity", True),
        ("a finite number > 0 that fp32 holds, or infinity", False),
        ("a number > 0 that fp32 holds", False),
    ],
)
def test_a_line_says_whether_infinity_counts(line, holds):
    if holds:
        assert ScalarSpec.parse(line).fp32
        return
    with pytest.raises(ValueError, match="argument specification"):
        ScalarSpec.parse(line)


def test_integer_arguments_bind_their_names():
    rules({"ids": "int [T] in [0, num_experts)"}, ["ids", "num_experts"], ["num_experts"])


@pytest.mark.parametrize(
    ("term", "postfix"),
    [
        ("n*(n+2)", ["n", "n", "2", "+", "*"]),
        ("d/2", ["d", "2", "/"]),
        ("a+b*c", ["a", "b", "c", "*", "+"]),
        ("K^128", ["K", "128", "^"]),
        ("-3", ["-3"]),
    ],
)
def test_terms(term, postfix):
    assert argspec._postfix(term) == postfix


@pytest.mark.parametrize("term", ["n-2", "n**2", "()", "n %", "n)", "(n", "+"])
def test_what_is_no_term(term):
    with pytest.raises(ValueError, match="is no dimension"):
        rules({"x": f"float [{term}]"}, ["x"])


X = torch.ones(2, 4, 6)


@pytest.mark.parametrize(
    ("operator", "arguments", "words"),
    [
        ("rms_norm", (X, torch.ones(5), 1e-6), "'weight': found shape (5,), expected float [d] "
                                               "with d = 6"),
        ("rms_norm", (X, torch.ones(6), -1.0), "'eps': found -1.0, expected a number >= 0"),
        ("rms_norm", (X, torch.ones(6), float("nan")), "'eps': found nan, expected a number >= 0"),
        ("hc_pre", (X, torch.ones(23, 24), torch.ones(24), torch.ones(3), 3, 0.0, 0.0),
         "'fn': found shape (23, 24), expected f32 [n*(n+2), n*d] with n*(n+2) = 24"),
        ("hc_pre", (X, torch.ones(24, 24), torch.ones(24), torch.ones(3), 0, 0.0, 0.0),
         "'sinkhorn_iters': found 0, expected 1 to 1000"),
        ("hc_post", (torch.ones(2, 6).half(), X, torch.ones(2, 4), torch.ones(2, 4, 4)),
         "'z': found torch.float16, expected torch.float32 like x"),
        ("act_quant", (X, 0), "'block_size': found 0, expected at least 1"),
        ("act_qdq", (X, 2, 7), "'channels': found 7, expected 0 to K = 6"),
        ("gate_topk", (torch.ones(1, 6), torch.ones(3, 6), torch.ones(3), 4, 1.0), "'k': found 4, "
                                                                                   "expected 1 to "
                                                                                   "E = 3"),
        ("moe_dispatch", (torch.ones(1, 6), torch.tensor([[0, 9]]), 4),
         "'ids': found 9 at [0, 1], expected values in [0, 4)"),
        ("moe_dispatch", (torch.ones(1, 6), torch.tensor([[0, 1]]), 0),
         "'num_experts': found 0, expected 1 to 65536"),
        ("embed_streams", (torch.tensor([5]), torch.ones(5, 8), 4),
         "'input_ids': found 5 at [0], expected values in [0, 5)"),
        ("sample", (torch.ones(1, 6), torch.ones(1, 6), float("inf"), 1.0),
         "'temperature': found inf, expected a finite number >= 0 that fp32 holds"),
        ("sample", (torch.ones(1, 6), torch.ones(1, 6), 1e39, 1.0),
         "'temperature': found 1e+39, expected a finite number >= 0 that fp32 holds"),
        ("gate_topk", (torch.ones(1, 6), torch.ones(3, 6), torch.ones(3), 2, 5e-324),
         "'route_scale': found 5e-324, expected a finite number > 0 that fp32 holds"),
        ("gate_topk", (torch.ones(1, 6), torch.ones(3, 6), torch.ones(3), 2, float("nan")),
         "'route_scale': found nan, expected a finite number > 0 that fp32 holds"),
        ("sample", (torch.ones(1, 6), torch.ones(1, 6), 1.0, 0.0), "'top_p': found 0.0, expected a "
                                                                   "number in (0, 1]"),
        ("rope", (torch.ones(1, 2, 6), torch.tensor([-1]), torch.ones(2), False),
         "'positions': found -1 at [0], expected values in [0, inf)"),
    ],
)  # fmt: skip
def test_words_of_a_wrong_call(operator, arguments, words):
    with pytest.raises(ArgumentError) as caught:
        OPERATORS[operator](*arguments)
    assert str(caught.value) == f"dsv4::{operator}: argument {words}"


def test_a_wrong_call_writes_nothing():
    cache = torch.zeros(2, 4, 8)
    with pytest.raises(ArgumentError):
        OPERATORS["write_cache"](cache, torch.ones(1, 8), torch.tensor([99]))
    assert not cache.any()
