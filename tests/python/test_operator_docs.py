"""`dsv4-ascend ops --docs`: the committed pages are those of the contracts,
and the writer minds its folder.
"""

import platform
import re
from pathlib import Path

import pytest

from dsv4_ascend.cli import operator_pages
from dsv4_ascend.cli.main import main
from dsv4_ascend.cli.operator_pages import INDEX, pages, write_pages
from dsv4_backend import _C, OPERATORS, dispatch
from dsv4_backend.contract import Case
from dsv4_backend.dispatch import Candidate
from dsv4_backend.ops.dspark import markov_bias
from dsv4_backend.ops.norm import rms_norm

FOLDER = Path(__file__).parents[2] / "docs" / "operators"
ADVICE = "run `dsv4-ascend ops --docs docs/operators` and commit what it changes"


@pytest.fixture(scope="module")
def written():
    return pages()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other builds have other CPU candidates")
def test_committed_pages_are_current(written):
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    lagging = sorted(n for n in {*written, *committed} if written.get(n) != committed.get(n))
    assert not lagging, f"{', '.join(lagging)}: {ADVICE}"


def test_every_operator_has_a_page_that_the_index_names(written):
    assert set(written) == {INDEX, *(f"{name}.md" for name in OPERATORS)}
    assert set(re.findall(r"\]\((\w+\.md)\)", written[INDEX])) == set(written) - {INDEX}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_a_page_says_all_of_its_contract(operator, written):
    page = written[f"{operator.name}.md"]
    plain = page.replace(r"\|", "|")
    specs = [f"`{spec.text}`" for spec in operator.specs.values()]
    parts = [
        operator.schema,
        *specs,
        operator.tolerance.reason,
        f"ops/{operator.reference.__module__[17:]}.py",
    ]
    assert not [part for part in parts if part not in plain]
    assert all(f"* {fault}\n" in page for fault in operator.faults)
    assert f"{len(list(operator.iterate_cases()))} cases" in page
    assert len(page.splitlines()) < 120


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_links_of_a_page_lead_somewhere(operator, written):
    links = re.findall(r"\]\(([^)]+)\)", written[f"{operator.name}.md"])
    assert links
    assert not [link for link in links if not (FOLDER / link).resolve().is_file()]


@pytest.mark.long
def test_pages_do_not_depend_on_the_instruction_set_in_force(written):
    before = _C.isa()
    _C.set_isa("portable")
    try:
        assert pages() == written
    finally:
        _C.set_isa(before)


def test_candidates_say_what_they_take(monkeypatch, written):
    """As with an Ascend launcher in the build: asked for each chip,
    its reasons against what it does not take.
    """

    def candidates(name, x, *_, device, context):
        asked.add((device, context.chip))
        return [
            Candidate("rms_norm/aclnn", None if x.dim() == 2 else f"x has {x.dim()} | dimensions")
        ]

    asked = set()
    monkeypatch.setattr(
        dispatch, "native_kernels", lambda: {("rms_norm", "privateuseone"): ("rms_norm/aclnn",)}
    )
    monkeypatch.setattr(dispatch, "candidates", candidates)
    page = "\n".join(operator_pages._page(rms_norm))
    assert asked == {("privateuseone", "Ascend910B3"), ("privateuseone", "Ascend950PR_9599")}
    assert "| npu (A2) | `rms_norm/aclnn` | 17 of 19 | x has 3 \\| dimensions |" in page
    assert "| cpu (AVX-512) | `rms_norm/avx512` | 19 of 19 | - |" in written["rms_norm.md"]


def test_only_what_lags_is_written(tmp_path, written, monkeypatch):
    monkeypatch.setattr(operator_pages, "pages", lambda: written)
    assert set(write_pages(tmp_path / "new" / "folder")) == set(written)
    folder = tmp_path / "new" / "folder"
    assert write_pages(folder) == []
    (folder / "rope.md").write_text("edited by hand")
    (folder / "gone.md").write_text(written["rope.md"])
    (folder / "mine.md").write_text("a page of somebody else")
    assert write_pages(folder) == ["gone.md", "rope.md"]
    assert (folder / "rope.md").read_text() == written["rope.md"]
    assert (folder / "mine.md").read_text() == "a page of somebody else"
    assert not (folder / "gone.md").exists()


@pytest.mark.parametrize("change", ["case", "fault", "reason"])
def test_a_changed_contract_changes_its_page(change, monkeypatch, written):
    if change == "case":
        arguments = next(markov_bias.iterate_cases()).arguments
        monkeypatch.setattr(
            markov_bias, "make_cases", lambda draw: iter([Case("alone", "ideal", arguments)])
        )
    elif change == "fault":
        monkeypatch.setitem(markov_bias.output_faults, "one more", markov_bias.reference)
    else:
        monkeypatch.setattr(markov_bias, "tolerance", rms_norm.tolerance)
    assert "\n".join(operator_pages._page(markov_bias)) + "\n" != written["markov_bias.md"]


def test_the_command(tmp_path, capsys, monkeypatch, written):
    monkeypatch.setattr(operator_pages, "pages", lambda: written)
    with pytest.raises(SystemExit) as left:
        main(["ops", "--docs", str(tmp_path / "pages")])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(
        f"{len(OPERATORS)} operators: {len(written)} pages changed in "
    )


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as left:
            main(["ops", "--docs", str(folder)])
        assert left.value.code == 2
        assert "--docs" in capsys.readouterr().err
