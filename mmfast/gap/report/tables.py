"""All numbers of a survey as tables, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmfast.gap.report.words import (
    UNKNOWN,
    gap_share,
    inverse,
    number,
    optima,
    percent,
    plain,
    short,
)

if TYPE_CHECKING:
    from mmfast.gap.survey import Retrieval, SideFacts, Survey

Row = tuple[str, tuple[str, ...]]


class Table(NamedTuple):
    """A heading, the names of the columns, and rows of a name and its cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]


_SIDE: tuple[tuple[str, Callable[[SideFacts], str]], ...] = (
    ("rows", lambda side: f"{side.rows:,}"),
    ("width", lambda side: f"{side.width:,}"),
    ("type", lambda side: side.dtype),
    ("rows with NaN", lambda side: f"{side.nan_rows:,}"),
    ("rows of zeros", lambda side: f"{side.zero_rows:,}"),
    ("rows without a partner", lambda side: f"{side.alone:,}"),
    ("mean cosine of two rows", lambda side: number(side.cosines.mean)),
    ("its standard deviation", lambda side: number(side.cosines.std)),
    ("least cosine", lambda side: number(side.cosines.min)),
    ("largest cosine", lambda side: number(side.cosines.max)),
    ("uniformity", lambda side: number(side.uniformity)),
)


def tables(survey: Survey) -> list[Table]:
    """The sides, what lies between them, retrieval, the landscape."""
    sides = (survey.x, survey.y)
    names = tuple(short(side.name, 20) for side in sides)
    made = [
        Table("Each side", names, [(name, tuple(map(cell, sides))) for name, cell in _SIDE]),
        Table("Between them", ("",), _between(survey)),
        Table("Retrieval", tuple(f"from {name}" for name in names), _retrieval(survey)),
    ]
    if survey.landscape is not None:
        rows: list[Row] = [
            (
                f"temperature {inverse(at.temperature)}",
                (number(at.at_rest), number(at.loss), number(at.distance)),
            )
            for at in optima(survey)
        ]
        made.append(Table("Shifted along the gap", ("loss as is", "lowest", "at distance"), rows))
    return made


def _between(survey: Survey) -> list[Row]:
    pairs, others = survey.pairs, survey.others
    values = [
        ("pairs", f"{survey.paired:,}"),
        ("gap", number(float(survey.gap.distance))),
        ("its share of the mean squared distance", percent(gap_share(survey))),
        ("mean cosine of pairs", number(math.nan if pairs is None else pairs.mean)),
        ("its standard deviation", number(math.nan if pairs is None else pairs.std)),
        ("mean cosine of non-pairs", number(others.mean)),
        ("its standard deviation", number(others.std)),
        ("alignment", number(survey.alignment)),
        ("uniformity of both together", number(survey.uniformity)),
        (f"loss at scale {survey.options['logit_scale']:g}", number(survey.symmetric_loss)),
    ]
    axes = survey.pca.variance_ratio.tolist()
    values += [(f"variance, axis {i}", percent(share)) for i, share in enumerate(axes, 1)]
    return [(name, (value,)) for name, value in values]


def _retrieval(survey: Survey) -> list[Row]:
    ways = [survey.retrieval.x_to_y, survey.retrieval.y_to_x]
    ks = next((way.recall for way in ways if way is not None), {})

    def row(name: str, cell: Callable[[Retrieval], str]) -> Row:
        return name, tuple(UNKNOWN if way is None else cell(way) for way in ways)

    def recall(k: int) -> Callable[[Retrieval], str]:
        return lambda way: percent(way.recall[k])

    rows = [row(f"recall at {k}", recall(k)) for k in ks]
    rows.append(row("median rank", lambda way: f"{way.median_rank:,.0f}"))
    rows.append(row("queries", lambda way: f"{way.queries:,}"))
    rows.append(row("candidates", lambda way: f"{way.candidates:,}"))
    aligned = survey.relative_alignment
    rows.append(("relative alignment", (number(aligned.x_to_y), number(aligned.y_to_x))))
    rows.append(("loss", (number(survey.loss.x_to_y), number(survey.loss.y_to_x))))
    return rows


def as_text(made: Sequence[Table]) -> str:
    """The tables under each other, their columns aligned, in characters that programs read."""
    label = max(len(name) for table in made for name, _ in table.rows) + 2
    cells = [cell for table in made for _, row in table.rows for cell in row]
    width = max(map(len, [*cells, *(name for table in made for name in table.columns)])) + 2
    text = "\n\n".join("\n".join(_lines(table, label, width)) for table in made)
    return plain(text)


def _lines(table: Table, label: int, width: int) -> Iterator[str]:
    for name, cells in ((table.title, table.columns), *table.rows):
        yield (f"{name:<{label}}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()
