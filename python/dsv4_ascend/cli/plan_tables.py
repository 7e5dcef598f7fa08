"""Plans on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as Grid

from dsv4_ascend.cli import console
from dsv4_ascend.plan.explain import explained, notes
from dsv4_ascend.plan.memory import FITS, NO, TIGHT
from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.report import Note, Table, headline, tables

_COLOURS = {FITS: "green", TIGHT: "yellow", NO: "red"}
_SIDE_BY_SIDE = 100
"""Columns of a terminal from which on two narrow tables share the lines."""
_FEW = 5
"""Columns of a table up to which the first, which may be words, is wrapped."""
_LONG_WORD = 20
"""Characters from which on a word may be broken."""


def show(plan: Plan) -> None:
    """One or two screens: the answer, layouts, memory, times, what would change them."""
    out = console()
    asked, *answers = headline(plan)
    out.print(f"[bold]{escape(asked.text)}[/]", soft_wrap=True)
    for note in answers:
        out.print(_coloured(note.text), soft_wrap=True)
    layouts, memory, caches, *others = tables(plan)
    _print(out, layouts)
    if out.width >= _SIDE_BY_SIDE:
        pair = Grid.grid(padding=(0, 6))
        pair.add_row(_grid(memory), _grid(caches))
        out.print()
        out.print(pair)
        _print_notes(out, (*memory.notes, *caches.notes))
    else:
        for table in (memory, caches):
            _print(out, table)
    for table in others:
        _print(out, table)
    out.print()
    for note in notes(plan):
        out.print(escape(f"note: {note.text}"), soft_wrap=True)


def show_explained(plan: Plan) -> None:
    """Every number with its rule and source."""
    out = console()
    for table in explained(plan):
        _print(out, table)


def _print(out: Console, table: Table) -> None:
    out.print()
    out.print(_grid(table))
    _print_notes(out, table.notes)


def _print_notes(out: Console, lines: tuple[Note, ...]) -> None:
    for note in lines:
        out.print(Padding(escape(f"- {note.text}"), (0, 0, 0, 1), expand=False))


def _grid(table: Table) -> Grid:
    grid = Grid(
        box=None, pad_edge=False, title=escape(table.title), title_justify="left",
        title_style="bold", header_style="dim",
    )  # fmt: skip
    for i, name in enumerate(table.columns):
        words = [
            word for cell in (name, *(r.cells[i] for r in table.rows)) for word in cell.split()
        ]
        numeric = i > 0 and all(_is_numeric(row.cells[i]) for row in table.rows)
        grid.add_column(
            escape(name), justify="right" if numeric else "left", overflow="fold",
            no_wrap=i == 0 and len(table.columns) > _FEW,
            min_width=min(max(map(len, words), default=0), _LONG_WORD),
        )  # fmt: skip
    for row in table.rows:
        grid.add_row(*map(_coloured, row.cells))
    return grid


def _is_numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "+-"


def _coloured(text: str) -> str:
    word = text.partition(":")[0]
    colour = _COLOURS.get(word)
    return f"[bold {colour}]{word}[/]{escape(text[len(word) :])}" if colour else escape(text)
