"""Links between the documents of this repository lead to files and headings that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def documents():
    """Documents of the project, not of what is installed or built beside it."""
    files = (file.relative_to(ROOT) for file in ROOT.rglob("*.md"))

    return sorted(
        str(file)
        for file in files
        if not any(part.startswith(".") or part == "build" for part in file.parts)
    )


def anchor(heading):
    """A heading as GitHub links to it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {anchor(line) for line in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}


def broken(file: Path, text: str) -> list[str]:
    """Links of a document that lead nowhere."""
    found = []
    for link in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (
            heading and heading not in anchors(target.read_text(encoding="utf-8"))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("name", documents())
def test_every_link_leads_somewhere(name):
    file = ROOT / name
    assert broken(file, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("link", ["docs/none.md", "#no-heading", "README.md#no-heading"])
def test_a_broken_link_is_seen(link):
    assert broken(ROOT / "README.md", f"see [there]({link})") == [link]


def test_a_good_link_is_not():
    assert broken(ROOT / "README.md", "[a](docs/spec/v4.md) [b](https://x.org/y) [c](docs)") == []
