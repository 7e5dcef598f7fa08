"""One page per operator, written from its contract: `dsv4-ascend ops --docs FOLDER`."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_ascend.parity.runner import mutated_arguments
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.contract import PROFILES, Operator
from dsv4_backend.dispatch import Candidate, Context

INDEX = "README.md"
MACHINES = {
    "cpu": {"AVX-512": Context("avx512")},
    "npu": {
        "A2": Context("portable", chip="Ascend910B3", cann="9.1.0"),
        "A5": Context("portable", chip="Ascend950PR_9599", cann="9.1.0"),
    },
}
"""What candidates are asked about. Fixed, so that pages do not depend on who writes them."""

_MARK = (
    "<!-- Written by `dsv4-ascend ops --docs docs/operators`: "
    "change the contract, not this page. -->"
)
_SOURCES = "backend/dsv4_backend"


def pages() -> dict[str, str]:
    """File name -> text of every page: the index, and one per operator."""
    found = sorted(OPERATORS.values(), key=lambda op: (op.rows, op.name))
    texts = {f"{op.name}.md": "\n".join(_page(op)) + "\n" for op in found}
    return {INDEX: "\n".join(_index(found)) + "\n"} | texts


def write_pages(folder: Path) -> list[str]:
    """Write the pages into a folder; the names of those that changed.

    Pages of operators that are gone are deleted. No other file of the folder is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    gone = [path for path in folder.glob("*.md") if path.name not in wanted and _is_ours(path)]
    changed = {name: text for name, text in wanted.items() if _read(folder / name) != text}
    for name, text in changed.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in gone:
        path.unlink()
    return sorted([*changed, *(path.name for path in gone)])


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8", errors="replace").startswith(_MARK)


def _index(operators: list[Operator]) -> Iterator[str]:
    cases = {op.name: len(list(op.iterate_cases())) for op in operators}
    faults = sum(len(op.faults) for op in operators)
    yield from (_MARK, "", "# Operators", "")
    counts = f"{sum(cases.values())} parity cases, {faults} named faults"
    yield f"{len(operators)} operators, {counts}. Rows are those of the inventory in"
    yield "[spec/v4.md](../spec/v4.md) section 17. Adding one: [here](../adding-an-operator.md)."
    yield from _table("operator", "rows", "family", "cases", "faults", "kernels")
    for op in operators:
        link, kernels = f"[{op.name}]({op.name}.md)", ", ".join(_kernels(op)) or "-"
        yield _row(link, _rows(op), _family(op), cases[op.name], len(op.faults), kernels)


def _page(op: Operator) -> Iterator[str]:
    doc = inspect.cleandoc(op.__doc__ or "")
    yield from (_MARK, "", f"# {op.name}", "", "```", op.schema, "```", "")
    declared = f"declared in `{_SOURCES}/ops/{_family(op)}.py`"
    yield f"Row {_rows(op)} of [the inventory](README.md), {declared}."
    yield f"Source: {_source(doc)}"
    yield from ("", "```text", doc, "```", "", "## Arguments")
    yield from _arguments(op)
    yield from ("", "## Tolerance")
    yield from _tolerance(op)
    yield from ("", "## Proof", "")
    yield from _proof(op)
    yield from ("", "## Implementations")
    yield from _implementations(op)


def _source(doc: str) -> str:
    """The last words of a contract's docstring, with links to the pages that they cite."""
    words = " ".join(doc.rpartition("Source:")[2].split())
    return re.sub(r"spec/\w+\.md", r"[\g<0>](../\g<0>)", words)


def _arguments(op: Operator) -> Iterator[str]:
    yield from _table("argument", "type", "must be", "and beside the others", "written")
    written = mutated_arguments(op)
    for place, argument in enumerate(_schema(op).arguments):
        spec = op.specs.get(argument.name)
        line = f"`{spec.text}`" if spec else "any"
        default = f" = {argument.default_value}" if argument.has_default_value() else ""
        kind = f"`{argument.type}{default}`"
        beside = "; ".join(_relations(op, argument.name)) or "-"
        yield _row(f"`{argument.name}`", kind, line, beside, "yes" if place in written else "no")
    checks = {"shapes": op.check_shapes, "values": op.check_contents}
    functions = [name for name, check in checks.items() if check is not None]
    if functions:
        yield from ("", f"Functions of the contract check more of {' and '.join(functions)}.")


def _relations(op: Operator, argument: str) -> list[str]:
    """What an argument must be beside the others, in words; values come last."""
    of_argument = [relation for relation in op.relations if relation.arguments[0] == argument]
    shapes = [relation.words for relation in of_argument if not relation.reads_values]
    values = [f"values: {relation.words}" for relation in of_argument if relation.reads_values]
    return list(dict.fromkeys((*shapes, *values)))


def _tolerance(op: Operator) -> Iterator[str]:
    yield from _table("profile", "error at most")
    proved = {case.profile for case in op.iterate_cases()}
    for profile in (name for name in PROFILES if name in proved):
        atol, rtol = op.tolerance.limits(profile)
        exact = (atol, rtol) == (0, 0)
        yield _row(profile, "bit for bit" if exact else f"{atol:.3g} + {rtol:.3g} x \\|want\\|")
    yield from ("", f"Why: {op.tolerance.reason}.")


def _proof(op: Operator) -> Iterator[str]:
    profiles = Counter(case.profile for case in op.iterate_cases())
    counts = ", ".join(f"{profiles[name]} `{name}`" for name in PROFILES if profiles[name])
    yield f"{profiles.total()} cases ({counts}) against {_oracle(op)},"
    yield f"which tell the reference from {len(op.faults)} named faults:"
    yield ""
    yield from (f"* {name}" for name in op.faults)
    if op.left_out:
        left_out = (f"{name} ({why})" for name, why in op.left_out.items())
        yield from ("", f"Faults of outputs left out: {', '.join(left_out)}.")
    if op.equivalents:
        yield from ("", f"Automatic mutants explained there as equivalent: {len(op.equivalents)}.")
    yield from ("", f"    dsv4-ascend parity -k {op.name}/ --faults")


def _oracle(op: Operator) -> str:
    module = op.golden.__module__.rpartition(".")[2]
    return f"the oracle in `{_SOURCES}/proofs/{module}.py`"


def _implementations(op: Operator) -> Iterator[str]:
    yield from _table("on", "candidate", "takes", "says of the others")
    cases = [case.arguments for case in op.iterate_cases()]
    for device in _device_types(op):
        label = _label(device)
        for machine, context in MACHINES[label].items():
            where: dict[str, Any] = {"device": device, "context": context}
            asked = (dispatch.candidates(op.name, *arguments, **where) for arguments in cases)
            for answers in zip(*asked, strict=True):
                yield _row(f"{label} ({machine})", *_coverage(answers))
    yield _row("any", "`reference`", "all", "-")


def _coverage(answers: Sequence[Candidate]) -> tuple[str, str, str]:
    """A candidate's name, how many of the cases it takes, and its reasons against the others."""
    reasons = sorted({answer.reason for answer in answers if answer.reason})
    taken = sum(answer.reason is None for answer in answers)
    return f"`{answers[0].name}`", f"{taken} of {len(answers)}", "; ".join(reasons) or "-"


def _kernels(op: Operator) -> list[str]:
    found = dispatch.native_kernels()
    return [name for device in _device_types(op) for name in found[op.name, device]]


def _device_types(op: Operator) -> list[str]:
    """Those that the operator has candidates for."""
    return sorted(device for name, device in dispatch.native_kernels() if name == op.name)


def _label(device: str) -> str:
    """The NPU's device type has another name until torch_npu is loaded."""
    return "cpu" if device == "cpu" else "npu"


def _schema(op: Operator) -> Any:
    return getattr(torch.ops.dsv4, op.name).default._schema


def _family(op: Operator) -> str:
    return op.reference.__module__.rpartition(".")[2]


def _rows(op: Operator) -> str:
    return ", ".join(map(str, op.rows))


def _table(*headings: str) -> tuple[str, str, str]:
    return "", _row(*headings), _row(*("---" for _ in headings))


def _row(*cells: object) -> str:
    return f"| {' | '.join(_escaped(str(cell)) for cell in cells)} |"


def _escaped(cell: str) -> str:
    """`|` ends a cell unless it is escaped, in code too."""
    return re.sub(r"(?<!\\)\|", r"\\|", cell)
