"""Relations as data: what is an error at declaration, what terms compute, and each kind alone."""

import itertools

import pytest
import torch
from relation_calls import ints, longs, spaced

from dsv4_backend import _C, OPERATORS, argspec, dispatch
from dsv4_backend.contract import Operator, Tolerance
from dsv4_backend.errors import ArgumentError
from dsv4_backend.expressions import Symbol
from dsv4_backend.relations import (
    KINDS,
    Relation,
    bound,
    covered,
    distinct,
    given_if,
    looked_up_in,
    of_tokens_in,
    require,
    table,
    trailing,
    values_in,
)

_count = itertools.count()
LINES = {
    "x": "float [T, d]",
    "ids": "int [T]",
    "rows": "int [T, k]",
    "cache": "float [num_blocks, block_size, D]",
    "table": "int [R, columns]",
    "query_start_loc": "int [S]",
    "seq_lens": "int [R]",
    "expert_offsets": "int [E]",
}
_ARGUMENTS = "Tensor? x, Tensor ids, Tensor? rows, Tensor? cache, Tensor? table"
_BATCH = "Tensor? query_start_loc, Tensor? seq_lens, Tensor? expert_offsets, int most, float scale"


def probe(x, ids, rows, cache, table, query_start_loc, seq_lens, expert_offsets, most, scale):
    return ids.clone()


def declared(*relations):
    """An operator of its own name with all of `LINES`, not among `OPERATORS`."""
    name = f"probe_{next(_count)}"
    tensors = argspec.parse(LINES, list(LINES))
    schema = f"{name}({_ARGUMENTS}, {_BATCH}) -> Tensor"
    return Operator(schema, (), probe, tensors, Tolerance("none"), relations)


def checked(contract, **arguments):
    """The checks of a call, with ids that fit anything and None for what is left out."""
    defaults = dict.fromkeys(LINES) | {"ids": ints(0), "most": 0, "scale": 0.0}
    arguments = defaults | arguments
    _C.check(contract.name, *arguments.values())


def registered(*relations):
    contract = declared(*relations)
    dispatch.register(contract)
    return contract


def refusal(contract, **arguments):
    with pytest.raises(ArgumentError) as error:
        checked(contract, **arguments)
    return str(error.value).partition(": argument ")[2]


@pytest.mark.parametrize(
    "relation",
    [
        lambda: Relation("sorted", ("ids",), (), "", ""),
        lambda: Relation("Require", ("ids",), ("1",), "", ""),
        lambda: Relation("", ("ids",), (), "", ""),
        lambda: Relation("require", ("ids",), (), "", ""),
        lambda: Relation("distinct", ("ids", "rows"), (), "", ""),
        lambda: Relation("bound", ("most",), ("most",), "", ""),
    ],
)
def test_a_kind_has_its_arguments_and_terms(relation):
    with pytest.raises(ValueError, match="relation"):
        relation()


def test_the_checker_has_the_same_kinds():
    for kind, (terms, shapes) in KINDS.items():
        one = [_C.Term("1", [("n", 1)])]
        _C.RelationRule(kind, ["x"] * len(shapes), [0] * len(shapes), one * terms, [], [])
    with pytest.raises(ValueError, match="no kind of relation"):
        _C.RelationRule("sorted", ["x"], [0], [], [], [])


@pytest.mark.parametrize(
    ("relation", "words"),
    [
        (distinct("Ids", ""), "no argument is named 'Ids'"),
        (require("y", "T > 0", "", ""), "no argument is named 'y'"),
        (bound("least"), "no argument is named 'least'"),
        (distinct("rows", ""), "'int .T, k.', is not int .n."),
        (trailing("ids"), "'int .T.', is not int .rows, columns."),
        (looked_up_in("rows", "x", "0", "1", ""), "'float .T, d.', is not int .n."),
        (values_in("most", "0", "1", ""), "None, is not int of one or two"),
        (table("table", "ids", "0", "1"), "is not a cache"),
    ],
)
def test_arguments_that_do_not_fit_a_kind(relation, words):
    with pytest.raises(ValueError, match=words):
        declared(relation).compiled_relations()


@pytest.mark.parametrize(
    "term",
    [
        "t", "T +", "1.5", "'T'", "T ** 2", "T / 2", "T @ 2", "ids", "min(T, 2)", "max(T)",
        "given(T)", "rank(y)", "size(ids, ids)", "T if", "[T]", "lambda: T", "T.d", "scale > 0",
        "T in (1, 2)", "T is 1", "",
    ],
)  # fmt: skip
def test_what_is_no_term(term):
    for relation in (require("x", term, "", ""), require("x", "1", f"{{{term}}}", "")):
        with pytest.raises(ValueError, match="is no term"):
            declared(relation).compiled_relations()


def test_a_term_that_is_too_deep_is_refused():
    deep = "1"
    for _ in range(8):
        deep = f"(1 + {deep})"
    with pytest.raises(ValueError, match="is no term"):
        registered(require("x", deep, "", ""))
    for program in ([], [("+", 0)], [("n", 1), ("n", 2)], [("n", 1), ("Q", 0)]):
        with pytest.raises(ValueError, match="is no term"):
            _C.Term("wrong", program)


TERMS = {
    "T": 3, "-T": -3, "T - most": -4, "-7 // 2": -4, "-7 % 3": 2, "7 // -2": -4, "7 % -3": -2,
    "T // 0": 0, "T % 0": 0, "12 & 10": 8, "max(T, most)": 7, "max(-1, -2)": -1,
    "1 if T > 2 else 0": 1, "T if most == 0 else most": 7, "0 <= T < 3": 0, "0 <= T <= 3": 1,
    "not T": 0, "not (T == 4)": 1, "T == 4 or most == 7": 1, "T == 4 and most == 7": 0,
    "T == 3 and most == 7 and d == 2": 1, "T != 3": 0, "T >= 3": 1, "rank(x)": 2, "size(x, 1)": 2,
    "size(x, 2)": 0, "given(x)": 1, "given(rows)": 0, "is_e4m3(x)": 0, "positive(scale)": 1,
    "9223372036854775807 * 9223372036854775807": (2**63 - 1) ** 2,
    "-9223372036854775807 * 9223372036854775807": -((2**63 - 1) ** 2),
    "9223372036854775807 * 9223372036854775807 // 9223372036854775807": 2**63 - 1,
    "9223372036854775807 * 9223372036854775807 * 9223372036854775807 > 0": 1,
    "-9223372036854775807 * 9223372036854775807 * 9223372036854775807 < 0": 1,
}  # fmt: skip


def test_terms_are_what_python_makes_of_them():
    contract = registered(
        *(require("x", f"most != {i}", f"{{{t}}}", "") for i, t in enumerate(TERMS))
    )
    fixed = {"x": torch.ones(3, 2), "ids": ints(0, 0, 0), "scale": 0.5}
    plain = {t: v for t, v in TERMS.items() if "most" not in t}
    for i, term in enumerate(TERMS):
        if term in plain:
            said = refusal(contract, **fixed, most=i)
            assert said == f"'x': found {TERMS[term]}, expected "
    for term in TERMS.keys() - plain.keys():
        said = refusal(registered(require("x", "0", f"{{{term}}}", "")), **fixed, most=7)
        assert said == f"'x': found {TERMS[term]}, expected "


def test_conditions_hold_where_a_size_is_not_there():
    contract = registered(
        require("ids", "k > 3", "", ""), require("ids", "size(rows, 0) > 3", "", "")
    )
    checked(contract)
    assert refusal(contract, rows=ints([1])) == "'ids': found , expected "


def test_an_integer_is_shown_as_it_is():
    contract = registered(require("most", "most >= 0", "{number(most)}", "none below 0"))
    for value in (-1, -(1 << 62), -(1 << 63)):
        assert refusal(contract, most=value) == f"'most': found {value}, expected none below 0"


def test_words_of_optional_arguments():
    contract = registered(*given_if("rows", "most > 0", "{} for {{most}}"))
    checked(contract)
    checked(contract, rows=ints([1]), most=1)
    assert refusal(contract, most=2) == "'rows': found None, expected a tensor for 2"
    assert refusal(contract, rows=ints([1])) == "'rows': found a tensor, expected None for 0"


LAYOUTS = [lambda t: t, spaced, lambda t: t.long(), lambda t: spaced(t.long())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinds_read_any_integers_of_any_strides(layout):
    inside = registered(values_in("rows", "0", "most", "fewer than {most}"))
    checked(inside, rows=layout(ints([0, 1])), most=2)
    assert refusal(inside, rows=layout(ints([0, 2])), most=2).startswith(
        "'rows': found 2 at [0, 1]"
    )
    once = registered(distinct("ids", "each once"))
    for values in ([2, 0, 2], [5, 5, 5], [1, 0, 0]):
        found = sorted(v for v in values if values.count(v) > 1)[0]
        words = f"'ids': found {found} more than once, expected each once"
        assert refusal(once, ids=layout(ints(*values))) == words
    checked(once, ids=layout(ints(-1, 3, -1, 2)))
    last = registered(trailing("rows"))
    checked(last, rows=layout(ints([0, -1])))
    assert refusal(last, rows=layout(ints([-1, 0]))).startswith("'rows': found -1 at [0, 0]")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_and_tokens_of_any_strides(layout):
    batch = {"query_start_loc": layout(ints(0, 1)), "seq_lens": layout(ints(3))}
    pages = {"cache": torch.ones(2, 2, 1), **batch}
    there = registered(table("table", "cache", "0", "length"))
    checked(there, table=layout(ints([1, 0, 99])), **pages)
    for wrong, column in (([2, 0, 0], 0), ([1, -1, 0], 1), ([1, 1 << 30, 0], 1)):
        said = refusal(there, table=layout(ints(wrong)), **pages)
        assert said == f"'table': found {wrong[column]} at [0, {column}], expected 0 to 1"
    visible = registered(of_tokens_in("rows", "0", "position", "before {position}"))
    checked(visible, rows=layout(ints([0, 1])), **batch)
    said = refusal(visible, rows=layout(ints([2, 0])), **batch)
    assert said == "'rows': found 2 at [0, 0], expected before 2"


def test_values_at_the_ends_of_int64_do_not_overflow():
    most, least = (1 << 63) - 1, -(1 << 63)
    inside = registered(values_in("ids", "0", "most * most", "small"))
    checked(inside, ids=longs(most - 1), most=most)
    assert refusal(inside, ids=longs(least), most=most).startswith(f"'ids': found {least} at 0")
    batch = {"query_start_loc": longs(least, most), "seq_lens": longs(most)}
    one = {"cache": torch.ones(1, 1, 1), "table": longs([0]), **batch}
    there = registered(table("table", "cache", "length - new", "length + most"))
    assert "columns of 1 rows" in refusal(there, most=most, **one)
    visible = registered(of_tokens_in("rows", "0", "position * position + 1", "small"))
    checked(visible, rows=ints([0]), **batch)
    ends = registered(*covered("x", "T"))
    for offsets in ([0, most, 1], [least, 0, 1], [0, least, 1], [0, 1, most]):
        said = refusal(ends, x=torch.ones(1, 1), expert_offsets=longs(*offsets))
        assert said.startswith(f"'expert_offsets': found {offsets}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_start_loc": ints(0, 9, 3)},
        {"query_start_loc": ints(0, -9, 2)},
        {"query_start_loc": ints(-5, 2, 1 << 22)},
        {"query_start_loc": ints(0)},
        {"query_start_loc": ints()},
        {"query_start_loc": ints(0, 1, 2, 3, 4)},
        {"cache": torch.ones(1, 0, 1)},
        {"cache": torch.ones(0, 1, 1)},
        {"table": ints([], [])},
        {"seq_lens": ints(-5, 1 << 30)},
        {"ids": ints(-1, 5, 1 << 30)},
    ],
)
def test_nothing_outside_a_tensor_is_read_where_shapes_are_not_checked(wrong):
    """Kinds alone, without the relations of shapes that operators list before them."""
    batch = {"query_start_loc": ints(0, 1, 3), "seq_lens": ints(4, 4)}
    fits = {"cache": torch.ones(2, 2, 1), "table": ints([0, 1], [1, 0]), **batch}
    fits |= {"ids": ints(0, 1, 2), "rows": ints([0], [0], [0])}
    tokens = of_tokens_in("rows", "0", "9", "")
    rows_of = Relation(
        "distinct_rows", ("table", "cache", "query_start_loc", "seq_lens"), (), "", ""
    )
    for relation in (table("table", "cache", "0", "length"), tokens, rows_of,
                     looked_up_in("rows", "ids", "0", "1", "")):  # fmt: skip
        try:
            checked(registered(relation), **(fits | wrong))
        except ArgumentError:
            continue


def test_functions_of_an_extender_still_check():
    contract = declared(require("ids", "T < 9", "{T}", "fewer"))
    seen = []
    contract.shapes(lambda *arguments: seen.append("shapes"))

    @contract.contents
    def _(x, ids, *others):
        seen.append("contents")
        if ids.sum() > 5:
            raise contract.reject("ids", int(ids.sum()), "a sum of at most 5")

    dispatch.register(contract)
    checked(contract)
    with dispatch.use(check_contents=False):
        checked(contract, ids=ints(6))
    assert seen == ["shapes", "contents", "shapes"]
    assert refusal(contract, ids=ints(6)) == "'ids': found 6, expected a sum of at most 5"
    assert refusal(contract, ids=ints(*range(9))) == "'ids': found 9, expected fewer"
    assert seen[3:] == ["shapes", "contents"]


def test_sizes_that_are_symbols_are_left_to_the_call_that_has_numbers():
    def reads(x, ids):
        return torch.ops.dsv4.moe_dispatch(x, ids, 4)[0] + 1

    compiled = torch.compile(reads, dynamic=True, fullgraph=True, backend="eager")
    assert compiled(torch.ones(3, 2), longs([0], [1], [2])).shape == (3, 2)
    assert compiled(torch.ones(5, 2), longs(*([i % 4] for i in range(5)))).shape == (5, 2)
    with pytest.raises(Exception, match=r"found shape \(4, 2\), expected \[T, ...\] with T = 5"):
        torch.ops.dsv4.moe_dispatch(torch.ones(4, 2), longs(*([0] for _ in range(5))), 4)


def test_a_symbol_is_the_text_of_what_is_computed():
    d = Symbol("d")
    text = str(-(-d * 3 // 4) * 4 + (d - 1) % 8 + 2)
    contract = registered(require("x", "0", f"{{{text}}}", ""))
    for size in (1, 2, 5):
        expected = -(-size * 3 // 4) * 4 + (size - 1) % 8 + 2
        assert refusal(contract, x=torch.ones(1, size)) == f"'x': found {expected}, expected "


def test_operators_of_this_project_need_no_function():
    functions = [op.name for op in OPERATORS.values() if op.check_shapes or op.check_contents]
    assert not functions
