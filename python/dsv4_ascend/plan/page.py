"""A plan as one HTML page: the tables of the terminal and charts, nothing fetched."""

from __future__ import annotations

from html import escape

from dsv4_ascend.plan.explain import notes, numbers_table
from dsv4_ascend.plan.figures import figures
from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.report import Table, headline, tables

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #656d76; --line: #d8dee4;
  --roof: #57606a; --limit: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1;
  --line: #30363d; --roof: #9198a1; --limit: #ff7b72; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1360px; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.verdict { font-size: 1.1rem; margin: .2rem 0; } .FITS { color: #1a7f37; }
.TIGHT { color: #9a6700; } .NO { color: #cf222e; }
.soft, .legend { color: var(--soft); font-size: .87rem; margin: .2rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr));
  gap: 1rem 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .title { fill: var(--soft); }
svg .value { fill: var(--soft); font-size: 11px; } svg .limit { fill: var(--limit); }
svg .grid { stroke: var(--line); } svg .faded { opacity: .35; }
.legend span { display: inline-block; margin-right: .9rem; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px;
  margin-right: .3rem; vertical-align: -.05rem; }
.tables { display: flex; flex-wrap: wrap; column-gap: 4rem; } .tables > div { max-width: 100%; }
.tables .soft { max-width: 56rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
table.words th, table.words td { text-align: left; } ul { margin: .4rem 0; padding-left: 1.2rem; }
"""


def page(plan: Plan) -> str:
    """The whole page."""
    asked, verdict, *more = headline(plan)
    kind = plan.chosen.memory.verdict
    charts = "\n".join(
        f'<figure><h2>{escape(title)}</h2><p class="soft">{escape(words)}</p>{svg}</figure>'
        for title, words, svg in figures(plan)
    )
    body = "\n".join(map(_table, tables(plan)))
    lines = "\n".join(f"<p>{escape(note.text)}</p>" for note in more)
    below = "".join(f"<li>{escape(note.text)}</li>" for note in notes(plan))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(asked.text)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(asked.text)}</h1>\n"
        f'<p class="verdict {kind}"><b>{escape(verdict.text)}</b></p>\n'
        f'{lines}\n<div class="charts">\n{charts}\n</div>\n<div class="tables">\n{body}\n</div>\n'
        f"<h2>Notes</h2>\n<ul>{below}</ul>\n{_table(numbers_table(plan.question), 'words')}\n"
        "</body>\n</html>\n"
    )


def _table(table: Table, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells) + "</tr>"
        for row in table.rows
    )
    lines = "".join(f'<p class="soft">{escape(note.text)}</p>' for note in table.notes)
    return (
        f'<div><h2>{escape(table.title)}</h2>\n<div class="scroll"><table{named}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n{lines}</div>"
    )
