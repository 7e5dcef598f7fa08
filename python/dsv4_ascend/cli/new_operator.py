"""`dsv4-ascend ops new NAME`: the skeleton of an operator's contract and proof, to be filled in."""

from __future__ import annotations

import json
import keyword
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

import dsv4_backend
from dsv4_ascend.cli.skeletons import CONTRACT, NEXT, PROOF
from dsv4_backend.errors import EnvironmentFault

FOLDERS = ("backend/dsv4_backend/ops", "backend/dsv4_backend/proofs")


class _Kind(NamedTuple):
    """What stands in a skeleton for arguments of one type of the schema."""

    reference: str
    oracle: str
    line: str | None
    case: str


_KINDS = {
    "Tensor": _Kind("torch.Tensor", "Array", "float [T, d]", "draw.normal(tokens, d, dtype=dtype)"),
    "Optional[Tensor]": _Kind("torch.Tensor | None", "Array | None", "float [T, d]", "None"),
    "int": _Kind("int", "int", "at least 0", "1"),
    "float": _Kind("float", "float", "a finite number >= 0", "1e-6"),
    "bool": _Kind("bool", "bool", None, "False"),
    "Optional[int]": _Kind("int | None", "int | None", None, "None"),
    "Optional[float]": _Kind("float | None", "float | None", None, "None"),
    "str": _Kind("str", "str", None, '""'),
}
_LINE = 93  # a schema that is longer stands on several lines


def new(
    name: Annotated[str, typer.Argument(help="Of torch.ops.dsv4.NAME.", show_default=False)],
    schema: Annotated[str, typer.Option(help="Default: 'NAME(Tensor x) -> Tensor'.")] = "",
    family: Annotated[str, typer.Option(help="Name of the two files; default: NAME.")] = "",
    root: Annotated[Path | None, typer.Option(help="Default: the checkout in use.")] = None,
) -> None:
    """Write the skeleton of an operator: its contract in ops/, its proof in proofs/.

    Nothing is overwritten.
    """
    family = family or name
    for option, word in (("NAME", name), ("--family", family)):
        _check_name(option, word)
    if name in dsv4_backend.OPERATORS:
        raise typer.BadParameter(f"dsv4::{name} is an operator already", param_hint="NAME")
    schema = schema or f"{name}(Tensor x) -> Tensor"
    texts = _fill(_parsed(schema, name), schema, family)
    home = root or Path(dsv4_backend.__file__).parents[2]
    paths = [home / folder / f"{family}.py" for folder in FOLDERS]
    _check_free(paths)
    try:
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"a skeleton cannot be written: {error}") from error
    for path in paths:
        print(f"wrote {path.relative_to(home)}")
    print(NEXT.format(name=name, family=family))


def _check_name(option: str, word: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", word) or keyword.iskeyword(word):
        problem = f"{word!r} is no name of a Python module in small letters, as rms_norm is"
        raise typer.BadParameter(problem, param_hint=option)


def _check_free(paths: list[Path]) -> None:
    for path in paths:
        if not path.parent.is_dir():
            problem = f"{path.parent} is not a folder: name a checkout of dsv4-ascend"
            raise typer.BadParameter(problem, param_hint="--root")
        if path.exists():
            problem = f"{path} exists: choose another --family, or write the operator there by hand"
            raise typer.BadParameter(problem, param_hint="--family")


def _parsed(schema: str, name: str) -> Any:
    """The schema as torch reads it; a usage error for what no contract can have."""
    try:
        parsed = torch._C.parse_schema(schema)
    except RuntimeError as error:
        raise _bad_schema(schema, str(error).strip().partition(" here:")[0]) from error
    types = [str(a.type) for a in (*parsed.arguments, *parsed.returns)]
    unknown = sorted(set(types) - set(_KINDS))
    if (parsed.name, parsed.overload_name) != (name, ""):
        raise _bad_schema(schema, f"it names {parsed.name!r}, not {name!r}")
    if unknown:
        raise _bad_schema(schema, f"{unknown[0]} is not one of the types {', '.join(_KINDS)}")
    if not any("Tensor" in str(a.type) for a in parsed.arguments):
        raise _bad_schema(schema, "no argument is a Tensor, so no device is chosen")
    reserved = [a.name for a in parsed.arguments if keyword.iskeyword(a.name)]
    if reserved:
        raise _bad_schema(schema, f"{reserved[0]!r} is a word of Python")
    if any(a.kwarg_only for a in parsed.arguments):
        raise _bad_schema(schema, "arguments of a contract have places: no '*'")
    return parsed


def _bad_schema(schema: str, why: str) -> typer.BadParameter:
    example = "'rms_norm(Tensor x, Tensor weight, float eps) -> Tensor'"
    problem = f"{schema!r}: {why}; a schema is like {example}"
    return typer.BadParameter(problem, param_hint="--schema")


def _fill(parsed: Any, schema: str, family: str) -> tuple[str, str]:
    """The texts of ops/FAMILY.py and proofs/FAMILY.py."""
    kinds = {argument.name: _KINDS[str(argument.type)] for argument in parsed.arguments}
    returns = [_KINDS[str(r.type)] for r in parsed.returns]
    parts = {
        "name": parsed.name,
        "family": family,
        "schema": _quoted(schema),
        "lines": _indented(8, (f'"{a}": "{k.line}",' for a, k in kinds.items() if k.line)),
        "parameters": _indented(4, (f"{a.name}: {_typed(a)}," for a in parsed.arguments)),
        "arrays": _indented(4, (f"{a}: {k.oracle}," for a, k in kinds.items())),
        "meanings": _indented(4, (f"{a}: {_meaning(k)}" for a, k in kinds.items())),
        "values": _indented(16, (f"{k.case},  # {a}" for a, k in kinds.items())),
        "first": next(a.name for a in parsed.arguments if "Tensor" in str(a.type)),
        "result": _joined([kind.reference for kind in returns]),
        "array": _joined([kind.oracle for kind in returns]),
    }
    return CONTRACT.format(**parts), PROOF.format(**parts)


def _meaning(kind: _Kind) -> str:
    tensor = "Array" in kind.oracle
    return "shape, dtype, which values are allowed." if tensor else "its unit and its range."


def _typed(argument: Any) -> str:
    """Type and default of a parameter: the reference repeats the schema's defaults."""
    kind = _KINDS[str(argument.type)].reference
    if not argument.has_default_value():
        return kind
    value = argument.default_value
    return f"{kind} = {json.dumps(value) if isinstance(value, str) else repr(value)}"


def _quoted(schema: str) -> str:
    pieces = textwrap.wrap(schema, 88, drop_whitespace=False) if len(schema) > _LINE else [schema]
    return "\n    ".join(f'"{piece}"' for piece in pieces)


def _indented(columns: int, lines: Any) -> str:
    return "\n".join(" " * columns + line for line in lines)


def _joined(types: list[str]) -> str:
    return types[0] if len(types) == 1 else f"tuple[{', '.join(types)}]" if types else "None"
