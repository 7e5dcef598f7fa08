"""Functions as syntax trees."""

from __future__ import annotations

import ast
import copy
import inspect
import types
from functools import cache


@cache
def _definitions(module: types.ModuleType) -> dict[tuple[str, int], ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(module))
    return {
        (node.name, node.end_lineno or 0): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def source_of(function: types.FunctionType) -> ast.FunctionDef:
    """The definition of a function, without decorators and docstring."""
    module = inspect.getmodule(function)
    assert module is not None
    first = function.__code__.co_firstlineno
    named = [d for (name, _), d in _definitions(module).items() if name == function.__name__]
    (found,) = (d for d in named if _starts(d) == first)
    definition = copy.deepcopy(found)
    definition.decorator_list = []
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1:
        definition.body = body[1:]
    return definition


def _starts(definition: ast.FunctionDef) -> int:
    return min([definition.lineno, *(d.lineno for d in definition.decorator_list)])
