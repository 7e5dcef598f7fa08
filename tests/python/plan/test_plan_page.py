"""The page of a plan: strict HTML, nothing fetched, charts that show the plan's numbers, and what
a browser makes of it where there is one.
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from planned import planned

from dsv4_ascend.plan import charts
from dsv4_ascend.plan.figures import batches, contexts, figures
from dsv4_ascend.plan.page import page
from dsv4_ascend.plan.report import tables
from dsv4_ascend.plan.search import Judge

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}
OPTIONS = {
    "fits": {"context": 131072},
    "tight": {"model": "pro", "device": "950DT", "batch": 64, "draft_tokens": 3},
    "no": {"device": "910B4", "count": 8, "precision": "w8a8", "context": 131072},
    "gpu": {"device": "H20", "count": 8, "batch": 64},
    "a few tokens": {"context": 3, "count": 1, "device": "B200"},
}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Strict(HTMLParser):
    """Every element is closed in order; names and attributes are kept."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def svgs(text):
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def bars(svg):
    """Groups of parts (values, heights in pixels) of a chart of bars, from left to right."""
    groups = [g for g in svg.iter(f"{SVG}g") if g.get("class") in ("bar", "faded")]
    parts = [list(g.iter(f"{SVG}rect")) for g in groups]
    return [[(float(r.get("data-value")), float(r.get("height"))) for r in one] for one in parts]


@pytest.fixture(scope="module", params=OPTIONS)
def found(request):
    return planned(**OPTIONS[request.param])


def test_the_page_is_strict_and_fetches_nothing(found):
    text = page(found)
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert parser.seen.count("svg") == 4
    assert parser.seen.count("table") == len(tables(found)) + 1
    assert not parser.links
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.seen)
    assert not re.search(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}


def test_bars_are_the_steps_of_the_plan(found):
    _, by_batch, by_context, memory = (bars(svg) for svg in svgs(page(found)))
    chosen = found.chosen
    steps = [chosen.decode_at(per_group) for per_group in batches(found)]
    steps_by_context = [
        chosen.decode_at(chosen.memory.per_group, None, context) for context in contexts(found)
    ]
    for drawn, expected in ((by_batch, steps), (by_context, steps_by_context)):
        sums = [sum(value for value, _ in bar) for bar in drawn]
        assert sums == pytest.approx([1e3 * one.seconds for one in expected], rel=1e-4)
    held = chosen.memory
    used = held.weights + held.draft + held.comm + held.workspace + held.per_group * held.cache
    at = contexts(found).index(found.question.context)
    assert sum(value for value, _ in memory[at]) == pytest.approx(used / 1e9, rel=1e-4)


def test_heights_are_in_proportion(found):
    for svg in svgs(page(found))[1:]:
        parts = [part for bar in bars(svg) for part in bar]
        largest, height = max(parts)
        scale = height / largest
        for value, height in parts:
            assert height == pytest.approx(value * scale, abs=0.02)


def test_bars_beyond_memory_are_faded():
    found = planned(context=131072)
    groups = list(svgs(page(found))[1].iter(f"{SVG}g"))
    held = found.chosen.memory.requests_per_group
    assert [g.get("class") == "faded" for g in groups] == [b > held for b in batches(found)]
    assert {g.get("class") for g in groups} == {"bar", "faded"}


def test_roofline_points_lie_under_the_roof(found):
    svg = svgs(page(found))[0]
    titles = [circle.find(f"{SVG}title").text for circle in svg.iter(f"{SVG}circle")]
    assert {"decode: experts", "prefill: dense"} <= set(titles)
    roofs = [
        float(line.get("points").split()[-1].split(",")[1])
        for line in svg.iter(f"{SVG}polyline")
        if line.get("style") == "stroke: var(--roof)"
    ]
    top = min(roofs)
    for circle in svg.iter(f"{SVG}circle"):
        assert float(circle.get("cy")) >= top - 0.1
        assert 0 <= float(circle.get("cx")) <= charts.WIDTH


def test_everything_is_inside_the_picture(found):
    for svg in svgs(page(found)):
        for text in svg.iter(f"{SVG}text"):
            if text.get("x"):
                assert 0 <= float(text.get("x")) <= charts.WIDTH
                assert 0 <= float(text.get("y")) <= charts.HEIGHT


def test_names_from_outside_are_escaped(tmp_path):
    chart = charts.Chart('a "<b>"')
    chart.text(1, 2, "<script>&")
    assert "<script>" not in chart.svg()
    assert ElementTree.fromstring(chart.svg()).get("aria-label") == 'a "<b>"'


@pytest.mark.parametrize("high", [0.003, 0.9, 1, 7, 33.3, 1234, 9.99e9])
def test_ticks_are_round_and_few(high):
    ticks = charts.vertical(0.0, high).ticks()
    assert 3 <= len(ticks) <= 9
    assert ticks[0] == 0
    assert ticks[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (12.34, "12.3"), (999.6, "1k"), (1200, "1.2k"), (3e6, "3M")],
)
def test_short_numbers(value, text):
    assert charts.short(value) == text


PROBE = """<script>
const found = [];
document.querySelectorAll("svg").forEach((svg, chart) => {
  const texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  boxes.forEach(([name, a], i) => {
    if (a.left < frame.left || a.right > frame.right ||
        a.top < frame.top || a.bottom > frame.bottom)
      found.push([chart, name, "outside"]);
    boxes.slice(i + 1).forEach(([other, b]) => {
      const dx = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const dy = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (dx > 1 && dy > 3) found.push([chart, name, other]);
    });
  });
});
const told = document.createElement("pre");
told.id = "told";
told.textContent = JSON.stringify({overlaps: found,
  wide: document.documentElement.scrollWidth > window.innerWidth});
document.body.append(told);
</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium here: the page is parsed strictly instead")
def test_a_browser_shows_it_without_overlaps(found, tmp_path):
    (tmp_path / "page.html").write_text(page(found).replace("</body>", f"{PROBE}</body>"))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}",
            "--dump-dom", f"file://{tmp_path / 'page.html'}"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=True)
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert told == {"overlaps": [], "wide": False}


def test_charts_have_the_judged_verdicts():
    found = planned(context=131072)
    svg = svgs(figures(found)[3][2])[0]
    classes = [g.get("class") for g in svg.iter(f"{SVG}g")]
    for context, kind in zip(contexts(found), classes, strict=True):
        asked = planned(context=context, layout=str(found.chosen.layout)).question
        verdict = Judge.of(asked).candidate(found.chosen.layout).memory.verdict
        assert (verdict == "NO") == (kind == "faded")
