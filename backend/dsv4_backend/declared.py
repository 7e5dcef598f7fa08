"""What the schema of a declared operator, its reference and its lines say about each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dsv4_backend.argspec import Spec
from dsv4_backend.relations import Relation

_NONE = inspect.Parameter.empty


def kinds_of_arguments(schema: str, reference: Callable[..., Any]) -> dict[str, str]:
    """Argument -> its type, in the schema's order; ValueError if the reference has another one."""
    parsed = torch._C.parse_schema(schema).arguments
    parameters = inspect.signature(reference).parameters.values()
    wanted = [(a.name, a.default_value if a.has_default_value() else _NONE) for a in parsed]
    found = [(p.name, p.default) for p in parameters]
    if found != wanted:
        raise ValueError(
            f"{schema!r}: the reference takes {_in_words(found)}, "
            f"expected {_in_words(wanted)} like the schema"
        )
    return {argument.name: str(argument.type) for argument in parsed}


def _in_words(parameters: Sequence[tuple[str, object]]) -> str:
    words = (name if value is _NONE else f"{name}={value}" for name, value in parameters)
    return f"({', '.join(words)})"


def check_numbers(
    schema: str, kinds: Mapping[str, str], specs: Mapping[str, Spec], relations: Sequence[Relation]
) -> None:
    """ValueError for a number that anything goes for, NaN too."""
    ruled = {*specs, *(relation.arguments[0] for relation in relations)}
    free = [name for name, kind in kinds.items() if kind in ("int", "float") and name not in ruled]
    if free:
        raise ValueError(f"{schema!r}: number {free[0]!r} has neither a line nor a relation")
