"""The page of a report: one file of HTML and CSS that asks for nothing else and runs no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from mmfast.gap.report.tables import Table
from mmfast.gap.report.words import Answer

# what the colours of the pictures become on dark paper
DARK = {
    "#ffffff": "#15191e",
    "#000000": "#f2f4f6",
    "#333333": "#d5dae0",
    "#e6e6e6": "#2a3037",
    "#b8b8b8": "#6b7480",
    "#0072b2": "#4fb0e8",
    "#d55e00": "#f58a3c",
}

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c232b; --soft: #5a6573;
  --line: #dfe3e8; --card: #f5f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --ink: #e4e8ec; --soft: #9aa5b1;
  --line: #2f363e; --card: #1c2127; --accent: #4fb0e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; }
p { margin: 0 0 0.75rem; }
.soft, figcaption, footer { color: var(--soft); font-size: 0.9rem; }
.answers { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.pictures, .tables { columns: 2 25rem; column-gap: 2.5rem; }
figure, .wide { margin: 0 0 2rem; break-inside: avoid; }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1.1rem 1.25rem; }
.answer h3 { margin: 0; font-size: 0.95rem; font-weight: 600; color: var(--soft); }
.answer .figure { margin: 0.15rem 0 0.5rem; font-size: 1.7rem; font-weight: 650; line-height: 1.2;
  color: var(--accent); font-variant-numeric: tabular-nums; }
.answer p:last-child { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin: 0.5rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; }
th, td { padding: 0.3rem 0 0.3rem 0.9rem; text-align: right; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th, thead td { border: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
thead th { overflow-wrap: anywhere; min-width: 5.75rem; }
tbody th { text-align: left; font-weight: 400; padding-left: 0; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media print { body { max-width: none; padding: 0; } .answer { break-inside: avoid; } }
"""


class Picture(NamedTuple):
    """An SVG, what it is for those who do not see it, and what stands below it."""

    svg: str
    alt: str
    caption: str


def page(
    title: str,
    lead: str,
    answers: Sequence[Answer],
    pictures: Sequence[Picture],
    tables: Sequence[Table],
    notes: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """The whole page. Everything given is text and is escaped here, the SVG excepted.

    Args:
        notes: sentences on what was left out and how the words are chosen.
        facts: names and values for the foot.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # nothing that a name could smuggle in is loaded or run
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            f'<header><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p></header>',
            "<main>",
            *_section("In short", "answers", map(_answer, answers)),
            *_section("Pictures", "pictures", map(_figure, pictures)),
            *_section("Numbers", "tables", map(_table, tables)),
            *_section("Notes", "notes", (f"<p>{escape(note)}</p>" for note in notes)),
            "</main>",
            "<footer>",
            *(f"<div>{escape(name)}: {escape(value)}</div>" for name, value in facts.items()),
            "</footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(heading: str, kind: str, parts: Iterator[str]) -> list[str]:
    opening = f'<section aria-labelledby="{kind}"><h2 id="{kind}">{heading}</h2>'
    return [opening, f'<div class="{kind}">', *parts, "</div></section>"]


def _answer(answer: Answer) -> str:
    return (
        f'<article class="answer"><h3>{escape(answer.question)}</h3>'
        f'<p class="figure">{escape(answer.figure)}</p><p>{escape(answer.text)}</p></article>'
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(adaptive(picture.svg).encode()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def adaptive(svg: str) -> str:
    """The SVG with colours that follow the reader's, as light or dark paper."""
    # a name in a comment may look like a colour
    svg = re.sub("<!--.*?-->", "", svg, flags=re.DOTALL)
    for color in DARK:
        svg = svg.replace(color, f"var(--c{color[1:]}, {color})")
    dark = " ".join(f"--c{light[1:]}: {color};" for light, color in DARK.items())
    style = f"<style>@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    return svg.replace("<defs>", f"<defs>{style}", 1)


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if any(table.columns) else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in table.rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>'
        f"<caption>{escape(table.title)}</caption>{head}"
        f"<tbody>{rows}</tbody></table></div>"
    )
