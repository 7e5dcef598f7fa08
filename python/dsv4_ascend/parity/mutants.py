"""Automatic mutants of an operator's reference: small edits of its source,
its arguments and its results.

They ask what named faults cannot: would the oracle and the cases notice if the reference itself
were wrong? An edit is one change of the syntax tree (see `_edits`); the edited function replaces
the original in every function of dsv4_backend that the reference reaches. Nothing is written by
hand, so nothing is forgotten on purpose.
"""

from __future__ import annotations

import ast
import copy
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from dsv4_ascend.parity.sources import source_of
from dsv4_backend.contract import Operator

Function = Callable[..., Any]
Edit = Callable[[], ast.AST]
TensorEdit = Callable[[torch.Tensor], torch.Tensor]

PACKAGE = "dsv4_backend"
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_DROPPED_TERMS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_RENAMED = {
    "amax": "amin", "amin": "amax", "max": "min", "min": "max", "sum": "mean", "mean": "sum",
    "ceil": "floor", "floor": "ceil", "rsqrt": "sqrt", "exp": "expm1", "sigmoid": "tanh",
    "cos": "sin", "sin": "cos",
}  # fmt: skip
_DROPPED_CALLS = frozenset((
    "float", "to", "clamp", "abs", "square", "sqrt", "relu", "type_as", "masked_fill", "flip",
    "roll", "bfloat16",
))  # fmt: skip
"""Methods that give a tensor of the same shape: without them a rounding or a step is missing."""
_PRODUCTS = frozenset(("linear", "matmul"))
"""Functions of two operands that exchange them."""
_ROUNDING = ("round", "quant", "qdq", "compute")
_EXTREMES = {"max": "min", "min": "max"}
"""Python's own, of numbers: a floor or a bound."""


@dataclass(frozen=True)
class Mutant:
    """One edited reference: "FUNCTION: BEFORE -> AFTER", numbered where an edit comes again."""

    name: str
    run: Function


def mutants(operator: Operator) -> list[Mutant]:
    """Every automatic mutant of an operator's reference, in an order that only its name decides."""
    reached = _reached(operator.reference)
    found = [*_result_mutants(operator), *_argument_mutants(operator)]
    seen: dict[str, int] = {}
    for function in reached:
        for label, tree in _edited(source_of(function), function.__globals__):
            name = f"{function.__name__}: {label}"
            seen[name] = seen.get(name, 0) + 1
            numbered = name if seen[name] == 1 else f"{name} ({seen[name]})"
            found.append(Mutant(numbered, _rebuilt(operator.reference, reached, function, tree)))
    random.Random(operator.name).shuffle(found)
    return found


def _times(x: torch.Tensor) -> torch.Tensor:
    return (x.double() * 1.01).to(x.dtype) if x.is_floating_point() else x + 1


def _without_last(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1) if x.dim() else x


def _on_codes(edit: TensorEdit) -> TensorEdit:
    """FP8 and E8M0 have no arithmetic: their bytes are edited."""
    return lambda x: (
        edit(x.view(torch.uint8)).view(x.dtype) if "float8" in str(x.dtype) else edit(x)
    )


_RESULT_EDITS: dict[str, TensorEdit] = {
    "* 1.01": _on_codes(_times),
    "without its last channel": _on_codes(_without_last),
    "shifted by one row": _on_codes(lambda x: x.roll(1, 0) if x.dim() else x),
    "shifted by one channel": _on_codes(lambda x: x.roll(1, -1) if x.dim() else x),
}


def _result_mutants(operator: Operator) -> Iterator[Mutant]:
    """Every output and every written argument, edited after the reference."""
    schema = getattr(torch.ops.dsv4, operator.name).default._schema
    written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.is_write]
    for label, edit in _RESULT_EDITS.items():
        for number, returned in enumerate(schema.returns):
            name = returned.name or f"output {number}"
            yield Mutant(f"{name} {label}", _edited_output(operator.reference, number, edit))
        for position, name in written:
            yield Mutant(f"{name} {label}", _edited_argument(operator.reference, position, edit))


def _edited_output(reference: Function, number: int, edit: TensorEdit) -> Function:
    def run(*arguments: Any) -> Any:
        result = reference(*arguments)
        if not isinstance(result, tuple):
            return edit(result)
        return (*result[:number], edit(result[number]), *result[number + 1 :])

    return run


def _edited_argument(reference: Function, position: int, edit: TensorEdit) -> Function:
    def run(*arguments: Any) -> Any:
        result = reference(*arguments)
        arguments[position].copy_(edit(arguments[position].clone()))
        return result

    return run


def _argument_mutants(operator: Operator) -> Iterator[Mutant]:
    """The reference of other arguments: a number changed, a tensor shifted by one row."""
    schema = getattr(torch.ops.dsv4, operator.name).default._schema
    for position, argument in enumerate(schema.arguments):
        kind = str(argument.type)
        if kind in ("int", "float"):
            yield Mutant(
                f"other {argument.name}", _with_argument(operator.reference, position, _other)
            )
        elif kind == "Tensor" and not argument.is_write:
            shift = _on_codes(lambda x: x.roll(1, 0) if x.dim() else x)
            yield Mutant(
                f"{argument.name} shifted", _with_argument(operator.reference, position, shift)
            )


def _other(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value * 1.5


def _with_argument(reference: Function, position: int, edit: Callable[[Any], Any]) -> Function:
    return lambda *a: reference(*a[:position], edit(a[position]), *a[position + 1 :])


def _reached(reference: Function) -> list[types.FunctionType]:
    """The reference and the plain functions of the package that it reaches, callees first.

    A function in a field of a dataclass that the reference is made for counts if a reached function
    names the field.
    """
    order: list[types.FunctionType] = []

    def visit(function: Any) -> None:
        if function in order:
            return
        for value in _mentioned(function):
            if _is_plain(value):
                visit(value)
        if function not in order:
            order.append(function)

    assert isinstance(reference, types.FunctionType)
    visit(reference)
    used = set[str]().union(*map(_attributes, order))
    for name, value in _held(_closure(reference).values()):
        if name in used and _is_plain(value):
            visit(value)
    return order


def _is_plain(value: object) -> bool:
    """A function of the package at the top level of its module."""
    ours = isinstance(value, types.FunctionType) and value.__module__.startswith(PACKAGE)
    return ours and value.__qualname__ == value.__name__ != "<lambda>"  # type: ignore[attr-defined]


def _mentioned(function: types.FunctionType) -> Iterator[object]:
    """What the names and the attributes of modules in a function's source stand for."""
    own = {"_", *function.__code__.co_varnames, *function.__code__.co_cellvars}
    for node in ast.walk(source_of(function)):
        if isinstance(node, ast.Name) and node.id not in own:
            yield function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = function.__globals__.get(node.value.id)
            if isinstance(owner, Operator):
                yield owner.reference
            elif isinstance(owner, types.ModuleType) and owner.__name__.startswith(PACKAGE):
                yield getattr(owner, node.attr, None)


def _closure(function: types.FunctionType) -> dict[str, Any]:
    """Variables that a function inside another takes from there."""
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def _fields(value: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass or a named tuple, none of anything else."""
    if isinstance(value, Operator | type):
        return ()
    if is_dataclass(value):
        return tuple(item.name for item in fields(value))
    return getattr(value, "_fields", ()) if isinstance(value, tuple) else ()


def _held(values: Iterable[Any]) -> Iterator[tuple[str, object]]:
    """(name of a field, what it holds) of the records among `values`, and of those inside them."""
    for record in values:
        inside = {name: getattr(record, name) for name in _fields(record)}
        yield from inside.items()
        yield from _held(inside.values())


def _attributes(function: types.FunctionType) -> set[str]:
    return {node.attr for node in ast.walk(source_of(function)) if isinstance(node, ast.Attribute)}


def _edited(
    definition: ast.FunctionDef, names: Mapping[str, Any]
) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(label, copy of the definition with one edit) for every edit of every node of its body.

    names: what the names of its module stand for.
    """
    nodes = [node for statement in definition.body for node in ast.walk(statement)]
    for index, node in enumerate(nodes):
        for number, _ in enumerate(_edits(node, names)):
            tree = copy.deepcopy(definition)
            copies = [n for statement in tree.body for n in ast.walk(statement)]
            target = copies[index]
            after = list(_edits(target, names))[number]()
            label = f"{ast.unparse(node)} -> {ast.unparse(after)}"
            yield label, ast.fix_missing_locations(_Replace(target, after).visit(tree))


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, after: ast.AST) -> None:
        self.target, self.after = target, after

    def visit(self, node: ast.AST) -> Any:
        return self.after if node is self.target else super().visit(node)


def _edits(node: ast.AST, names: Mapping[str, Any]) -> Iterator[Edit]:
    """The edits of one node, each as a function that makes the edited node."""
    if isinstance(node, ast.BinOp):
        yield from _operator_edits(node)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        swapped: Any = _SWAPPED[type(node.ops[0])]()
        yield lambda: ast.Compare(node.left, [swapped, *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        if not isinstance(node.operand, ast.Constant):  # a negative number is edited as a number
            yield lambda: node.operand
    elif isinstance(node, ast.Constant):
        yield from _constant_edits(node)
    elif isinstance(node, ast.Call):
        yield from _call_edits(node)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id.isupper():
        yield from _named_constant_edits(node, names.get(node.id))
    elif isinstance(node, ast.BoolOp):
        swapped_bool = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield lambda: ast.BoolOp(swapped_bool, node.values)


def _operator_edits(node: ast.BinOp) -> Iterator[Edit]:
    if type(node.op) in _SWAPPED:
        swapped: Any = _SWAPPED[type(node.op)]()
        yield lambda: ast.BinOp(node.left, swapped, node.right)
    if isinstance(node.op, _DROPPED_TERMS):
        yield lambda: node.left
    if isinstance(node.op, ast.Sub | ast.Div | ast.MatMult):
        yield lambda: ast.BinOp(node.right, node.op, node.left)


def _constant_edits(node: ast.Constant) -> Iterator[Edit]:
    if type(node.value) is int:
        value = node.value
        yield lambda: ast.Constant(value + 1)
    elif type(node.value) is float:
        number = node.value
        yield lambda: ast.Constant(number * 1.01 if number else 0.01)
    elif type(node.value) is bool:
        flag = node.value
        yield lambda: ast.Constant(not flag)


def _named_constant_edits(node: ast.Name, value: object) -> Iterator[Edit]:
    """A limit, a floor or a size that stands at the top of its module."""
    if type(value) is int:
        yield lambda: ast.BinOp(node, ast.Add(), ast.Constant(1))
    elif type(value) is float:
        yield lambda: ast.BinOp(node, ast.Mult(), ast.Constant(2))


def _call_edits(node: ast.Call) -> Iterator[Edit]:
    function = node.func
    if isinstance(function, ast.Attribute):
        if function.attr in _RENAMED:
            renamed = ast.Attribute(function.value, _RENAMED[function.attr], function.ctx)
            yield lambda: ast.Call(renamed, node.args, node.keywords)
        if function.attr in _DROPPED_CALLS and not _is_module(function.value):
            yield lambda: function.value
        if function.attr in _PRODUCTS and len(node.args) == 2:
            yield lambda: ast.Call(function, node.args[::-1], node.keywords)
    elif isinstance(function, ast.Name) and function.id in _EXTREMES and len(node.args) == 2:
        other = ast.Name(_EXTREMES[function.id], ast.Load())
        yield lambda: ast.Call(other, node.args, node.keywords)
        yield lambda: node.args[0]
        yield lambda: node.args[1]
    elif (
        isinstance(function, ast.Name)
        and node.args
        and any(part in function.id for part in _ROUNDING)
    ):
        yield lambda: node.args[0]


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "math", "np")


def _rebuilt(
    reference: Function,
    reached: list[types.FunctionType],
    edited: types.FunctionType,
    tree: ast.FunctionDef,
) -> Function:
    """The reference over re-made copies of all that it reaches,
    with `tree` in the place of `edited`.

    Made when it is called first: most mutants of a long list are never run.
    """
    assert isinstance(reference, types.FunctionType)

    @cache
    def make() -> Function:
        names = {f.__module__: dict(f.__globals__) for f in reached}
        names[reference.__module__] |= _closure(reference)
        spaces = {module: dict(known) for module, known in names.items()}
        made: dict[types.FunctionType, Function] = {}
        for function in reached:
            space = spaces[function.__module__]
            _link(space, names[function.__module__], made)
            definition = tree if function is edited else source_of(function)
            future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
            code = ast.fix_missing_locations(ast.Module([future, definition], []))
            exec(compile(code, f"<mutant of {function.__name__}>", "exec"), space)
            made[function] = space[function.__name__]
        for module, space in spaces.items():
            _link(space, names[module], made)
        return made[reference]

    return lambda *arguments: make()(*arguments)


def _link(
    space: dict[str, Any], known: dict[str, Any], made: dict[types.FunctionType, Function]
) -> None:
    """Let names of a namespace that stand for functions in `known`,
    or for what holds them, mean re-made ones.
    """
    for name, value in known.items():
        if isinstance(value, types.FunctionType) and value in made:
            space[name] = made[value]
        elif isinstance(value, Operator) and value.reference in made:
            space[name] = types.SimpleNamespace(reference=made[value.reference])
        elif isinstance(value, types.ModuleType) and value.__name__.startswith(PACKAGE):
            ours = {f.__name__: g for f, g in made.items() if f.__module__ == value.__name__}
            space[name] = types.SimpleNamespace(**{**vars(value), **ours})
        elif _fields(value):
            space[name] = _relinked(value, made)


def _relinked(record: Any, made: dict[types.FunctionType, Function]) -> Any:
    """A record with re-made functions in the places of those that it holds."""
    changed: dict[str, Any] = {}
    for name in _fields(record):
        value = getattr(record, name)
        if _fields(value):
            changed[name] = _relinked(value, made)
        elif isinstance(value, types.FunctionType) and value in made:
            changed[name] = made[value]
    if not changed:
        return record
    made_again: Any = getattr(record, "_replace", None) or partial(replace, record)
    return made_again(**changed)
