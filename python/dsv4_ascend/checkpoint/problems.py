"""How an error lists many problems: every one while they are few,
their kinds first when they are many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_SHOWN = 50
_FEW = 20
_OTHER = "other"

_KINDS = {
    "; not read: ": "on files that are not read",
    "is missing": "missing",
    "surplus": "surplus",
    "found dtype": "of another dtype",
    "found shape": "of another shape",
    "without its scale": "without a scale",
    "expected one tensor per name": "stored twice",
    "found it here": "not where the index says",
    "found not there": "not where the index says",
    "found shard": "shards missing",
    "truncated": "truncated",
    "overlaps": "overlapping",
    "leaves a hole": "behind holes",
    "found a name": "badly named",
    "data_offsets": "with bad entries",
    "mixed": "of mixed formats",
    "unknown field": "unknown fields",
    ": missing": "missing fields",
}
"""A part of a problem's text -> its kind in the summary; the first that fits counts."""


def listed(where: object, problems: Sequence[str]) -> str:
    """`where: N problem(s)`, the kinds if there are more than 20, then the first 50, one a line."""
    lines = [f"{where}: {counted(problems) if len(problems) > _FEW else _number(problems)}"]
    lines += [f"  - {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  - and {len(problems) - _SHOWN} more")
    return "\n".join(lines)


def counted(problems: Sequence[str]) -> str:
    """`N problem(s)`, and of which kinds unless no kind of them is known."""
    kinds = summary(problems)
    return (
        _number(problems)
        if kinds == f"{len(problems)} {_OTHER}"
        else f"{_number(problems)}: {kinds}"
    )


def _number(problems: Sequence[str]) -> str:
    return f"{len(problems)} problem(s)"


def summary(problems: Sequence[str]) -> str:
    """How many problems of which kind,
    the most frequent first: `97 missing, 3 of another dtype`.
    """
    kinds = Counter(_kind(problem) for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _kind(problem: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in problem), _OTHER)
