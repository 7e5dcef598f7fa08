"""Every printed number with the rule behind it, and every number of the rules with its source."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dsv4_ascend.plan.numbers import KEYS
from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.question import Question
from dsv4_ascend.plan.report import Note, Row, Table, gb, headline, tables
from dsv4_ascend.plan.rules import RULES
from dsv4_ascend.plan.tables import DEVICES
from dsv4_ascend.plan.work import works


def explained(plan: Plan) -> list[Table]:
    """Tables for --explain: printed numbers, rules, work, numbers, formats,
    parameters.
    """
    return [
        _printed(plan),
        _rules(),
        _work(plan),
        numbers_table(plan.question),
        _formats(plan.question),
        _parameters(plan.question),
    ]


def _printed(plan: Plan) -> Table:
    rows = [_row(note.text, note) for note in (*headline(plan), *notes(plan))]
    for table in tables(plan):
        for row in table.rows:
            rules = [rule or row.rule for rule in table.rules]
            for column, cell, rule in list(
                zip(table.columns, row.cells, rules, strict=True)
            )[1:]:  # fmt: skip
                if any(character.isdigit() for character in cell):
                    rows.append(
                        Row((f"{row.cells[0]}: {column} {cell}".replace(":  ", ": "), rule))
                    )
        rows += [_row(note.text, note) for note in table.notes]
    return Table("printed, and the rule behind it", ("printed", "rule"), ("", ""), tuple(rows))


def _row(text: str, note: Note) -> Row:
    return Row((text, note.rule))


def notes(plan: Plan) -> list[Note]:
    """The lines below all tables."""
    return [Note(text, rule) for rule, text in plan.notes]


def _rules() -> Table:
    rows = tuple(
        Row((name, rule.formula, rule.source, ", ".join(rule.keys))) for name, rule in RULES.items()
    )
    return Table("rules", ("rule", "formula", "source", "numbers"), ("",) * 4, rows)


def numbers_table(question: Question) -> Table:
    """All numbers of the device, the preset and the rest, and where they are from."""
    rows = []
    for key in KEYS:
        if key in question.numbers:
            one = question.numbers.of(key)
            others = f"; others: {one.others}" if one.others else ""
            rows.append(
                Row((key, f"{one.value:g} {one.unit}", KEYS[key].meaning, one.confidence,
                     one.source + others))
            )  # fmt: skip
    columns = ("number", "value", "meaning", "confidence", "source")
    return Table("numbers (--set KEY=VALUE changes one)", columns, ("",) * 5, tuple(rows))


def _work(plan: Plan) -> Table:
    """What the rules of the classes come to, before it is divided by rates."""
    question, chosen = plan.question, plan.chosen
    rows = []
    for name, load in chosen.loads():
        for one in works(chosen.site(), load, question.numbers):
            flops = ", ".join(f"{key} {count:.4g}" for key, count in one.flops.items() if count)
            waits = ", ".join(f"{count:g} {key}" for key, count in one.waits.items() if count)
            moved = (one.traffic, one.link, one.far)
            if flops or waits or any(moved):
                cells = (f"{size / 1e9:.4g}" if size else "" for size in moved)
                rows.append(Row((f"{name}: {one.name}", flops, *cells, waits)))
    columns = ("class", "FLOP by rate", "GB of memory", "GB of fabric", "GB behind it", "waits")
    title = f"work of one device, {chosen.layout}"
    return Table(title, columns, ("",) * 6, tuple(rows))


def _formats(question: Question) -> Table:
    precision, cache, pages = question.precision, question.cache, question.pages
    config = question.shapes.config
    width = f"{cache.entry_bytes(config):,} bytes a row, {cache.index_bytes(config)} of index keys"
    states = f"states {pages.csa_state} and {pages.hca_state} tokens a page"
    device = DEVICES["devices"][question.device]["title"]
    rows = (
        Row((question.device, f"{device}; preset {question.preset}", "", "devices.toml")),
        Row((precision.name, precision.title, precision.confidence, precision.source)),
        Row((cache.name, f"{cache.title}: {width}", cache.confidence, cache.source)),
        Row((f"block {pages.block}", states, pages.confidence, pages.source)),
    )
    return Table("formats", ("format", "what", "confidence", "source"), ("",) * 4, rows)


def _parameters(question: Question) -> Table:
    shapes, precision = question.shapes, question.precision
    main, draft = precision.bytes_of(shapes.main), precision.bytes_of(shapes.draft)
    rows = [
        Row((
            name, f"{count / 1e9:.4f}", f"{shapes.draft[name] / 1e9:.4f}",
            f"{precision.bits[name]:g}", gb(main[name]), gb(draft[name]),
        ))
        for name, count in shapes.main.items()
    ]  # fmt: skip
    columns = ("class", "parameters G", "of drafts G", "bits", "GB", "of drafts GB")
    title = f"parameters of {question.model}, counted from its configuration"
    return Table(title, columns, ("",) * 6, tuple(rows))


def sources(plan: Plan) -> dict[str, Any]:
    """Rules, numbers and formats for JSON."""
    question = plan.question
    numbers = [question.numbers.of(key) for key in KEYS if key in question.numbers]
    return {
        "rules": {name: asdict(rule) for name, rule in RULES.items()},
        "numbers": [asdict(one) | {"unit": one.unit} for one in numbers],
        "precision": {"name": question.precision.name, "source": question.precision.source},
        "cache": {"name": question.cache.name, "source": question.cache.source},
        "parameters": dict(question.shapes.main),
        "draft_parameters": dict(question.shapes.draft),
    }
