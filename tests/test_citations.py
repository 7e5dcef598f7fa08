"""Every section of the specification that code, tests and pages cite exists in docs/spec."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec"
FOLDERS = ("backend", "python", "csrc", "tests", "docs")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".md"}

NUMBER = r"\d+(?:\.\d+)*"
INSIDE = rf"(?:item|step)s? {NUMBER}(?: to {NUMBER})?"
# `spec/NAME.md`, or `spec` alone for v4.md; then numbers of sections and the words between them.
# Numbers of items and steps are no sections. Comment marks stand where a line ends.
CITATION = re.compile(
    rf"\bspec(?:/(?P<page>[\w-]+)\.md)?"
    rf"(?P<where>(?:[\s,;#]|//|and\b|to\b|sections?\b|{INSIDE}|{NUMBER}(?![\w^%]))*)"
)


def citations(text):
    """(page, section or None) of every citation: `spec/v4.md 2.2 to 2.4, 6` is v4 with 2.2,
    2.4 and 6.
    """
    for match in CITATION.finditer(text):
        sections = re.findall(NUMBER, re.sub(INSIDE, "", match["where"]))
        if match["page"]:
            yield match["page"], None
        yield from ((match["page"] or "v4", section) for section in sections)


@cache
def headings(page):
    """Numbers of the headings of a page of docs/spec, and of the items of a section's list as
    SECTION.ITEM; nothing when there is no such page.
    """
    path = SPEC / f"{page}.md"
    found, section = set(), ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if heading := re.match(rf"#+ ({NUMBER})\.?\s", line):
            section = heading[1]
            found.add(section)
        elif section and (item := re.match(r"(\d+)\. ", line)):
            found.add(f"{section}.{item[1]}")
    return frozenset(found)


def unresolved(text):
    return [
        f"{page}.md {section or ''}".strip()
        for page, section in citations(text)
        if section not in headings(page) and (section or not headings(page))
    ]


def cited_files():
    paths = (
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
    )
    return sorted(p for p in paths if SPEC not in p.parents and p != Path(__file__))


def test_every_cited_section_exists():
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in cited_files()
        if (found := unresolved(path.read_text(encoding="utf-8")))
    }
    assert not wrong, f"cited, but not in docs/spec: {wrong}"


def test_the_specification_is_cited():
    cited = [c for path in cited_files() for c in citations(path.read_text(encoding="utf-8"))]
    assert len([section for _, section in cited if section]) > 90


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("Source: spec/v4.md 3.1 [OFF-M].", ["3.1"]),
        ("(spec/v4.md 2.2 to 2.4)", ["2.2", "2.4"]),
        ("spec/v4.md 4.5 items 6 to 8, 15.1 T3", ["4.5", "15.1"]),
        ("spec/v4.md 2.1 step 3 and section 10", ["2.1", "10"]),
        ("# FP8 (spec/v4.md 6.1,\n# 6.2) of 128 channels", ["6.1", "6.2"]),
        ("// spec/v4.md\n// 4.3.1: states", ["4.3.1"]),
        ("rounding points (spec 6.1, 6.3)", ["6.1", "6.3"]),
        ("spec section 7", ["7"]),
    ],
)
def test_the_reader_of_citations_finds(text, sections):
    assert [section for _, section in citations(text) if section] == sections
    assert not unresolved(text)


@pytest.mark.parametrize(
    "text",
    [
        "spec/v4.md 6.99",
        "spec/v4.md 4.5, 18.1",
        "(spec 3.1 and 99)",
        "spec/lost.md section 4",
        "spec/lost.md",
    ],
)
def test_the_reader_of_citations_refuses(text):
    assert unresolved(text)
