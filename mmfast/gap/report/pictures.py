"""A survey drawn: five figures fit for print, each a matplotlib Figure without a title.

Colours are told apart by colour-blind eyes too (Okabe and Ito, Color Universal Design, 2008).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmfast.gap.report.words import inverse, number, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from mmfast.gap.survey import Survey
    from mmfast.ops._statistics import PairwiseStats

    Curve = NDArray[np.float64]

BLUE, ORANGE, GREY, INK, PALE = "#0072B2", "#D55E00", "#B8B8B8", "#333333", "#E6E6E6"
Style = dict[str, Any]
ARROW: Style = {"arrowstyle": "->", "color": "black", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
POINT: Style = {"s": 9, "alpha": 0.5, "linewidths": 0, "rasterized": True}
MEAN: Style = {"s": 70, "edgecolor": "white", "linewidth": 1.5, "zorder": 4}
ABOVE: Style = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "zorder": 6}
BOX: Style = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
DASHED: Style = {"color": GREY, "linewidth": 1, "linestyle": "--"}
RC: Any = {
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # names come from outside: a dollar in one of them is no formula
    "text.parse_math": False,
}


def tidy(axes: Axes) -> None:
    """Leave only the two spines that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def rendered(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """The file of a figure; the same bytes for the same figure."""
    import matplotlib

    out = BytesIO()
    metadata: Style = {"Date": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "mmfast"}), warnings.catch_warnings():
        # a name in a script the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format=form, dpi=200, facecolor="white", metadata=metadata)
    return out.getvalue()


def _styled(plot: Callable[[Survey], Figure]) -> Callable[[Survey], Figure]:
    @functools.wraps(plot)
    def drawn(survey: Survey) -> Figure:
        import matplotlib

        with matplotlib.rc_context(RC):
            return plot(survey)

    return drawn


def _figure(height: float = 3.3) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(5.2, height), layout="constrained")


@_styled
def plot_pairs(survey: Survey) -> Figure:
    """Cosines of pairs, and of rows of x and y that do not belong together."""
    return _cosines(_sets(survey))


def _sets(survey: Survey) -> list[tuple[str, PairwiseStats]]:
    """Pairs and non-pairs, where there are any."""
    sets = [("pairs", survey.pairs), ("non-pairs", survey.others)]
    return [(name, stats) for name, stats in sets if stats is not None and stats.count > 0]


@_styled
def plot_cone(survey: Survey) -> Figure:
    """Cosines of two rows of x, and of two rows of y."""
    sides = (survey.x, survey.y)
    return _cosines([(f"within {short(side.name)}", side.cosines) for side in sides])


def _cosines(sets: list[tuple[str, PairwiseStats]]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    for (label, stats), color in zip(sets, (BLUE, ORANGE), strict=False):
        edges, density = _density(stats)
        words = f"{label}: mean {number(stats.mean)}, spread {number(stats.std)}"
        axes.stairs(density, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(density, edges, color=color, linewidth=1.5, label=words)
    low, high = min(s.min for _, s in sets), max(s.max for _, s in sets)
    room = max(0.05, 0.03 * (high - low))
    axes.set_xlim(max(-1.0, low - room), min(1.0, high + room))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("density")
    return _finished(figure, axes)


def _density(stats: PairwiseStats) -> tuple[Curve, Curve]:
    """Edges and heights of a histogram whose bins are as wide as the number of pairs asks for."""
    assert stats.histogram is not None
    assert stats.edges is not None
    counts, edges = stats.histogram.double().numpy(), stats.edges.numpy()
    counts[0] += stats.below
    counts[-1] += stats.above  # rounding puts cosines past 1
    # Freedman and Diaconis (1981)
    wanted = 2 * (stats.quantile(0.75) - stats.quantile(0.25)) / stats.count ** (1 / 3)
    starts = np.arange(0, len(counts), max(1, round(wanted / (edges[1] - edges[0]))))
    wide = np.append(edges[starts], edges[-1])
    return wide, np.add.reduceat(counts, starts) / stats.count / np.diff(wide)


@_styled
def plot_cloud(survey: Survey) -> Figure:
    """Both sides in the plane of their largest common variance, an arrow between their means."""
    figure = _figure(3.8)
    axes = figure.subplots()
    pca, sides = survey.pca, (survey.x, survey.y)
    means = [(pca.axes @ (side.mean - pca.centre)).tolist() for side in sides]
    for side, points, mean, color, marker in zip(
        sides, (pca.x_points, pca.y_points), means, (BLUE, ORANGE), "o^", strict=True
    ):
        axes.scatter(*points.T.numpy(), color=color, marker=marker, label=short(side.name), **POINT)
        axes.scatter(*mean, color=color, marker=marker, **MEAN)
    # the gap is mean x - mean y
    (x, y), (x_from, y_from) = means
    axes.annotate("", (x, y), (x_from, y_from), arrowprops={**ARROW, "shrinkB": 5}, zorder=3)
    middle = ((x + x_from) / 2, (y + y_from) / 2)
    label = f"gap {number(float(survey.gap.distance))}"
    axes.annotate(label, middle, weight="bold", bbox=BOX, **ABOVE)
    first, second = pca.variance_ratio[:2].tolist()
    axes.set_xlabel(f"first principal component ({percent(first)} of the variance)")
    axes.set_ylabel(f"second ({percent(second)})")
    axes.set_aspect("equal", adjustable="datalim")
    return _finished(figure, axes, scale=2)


@_styled
def plot_landscape(survey: Survey) -> Figure:
    """The loss against the signed distance of the means, a panel for each temperature."""
    landscape = survey.landscape
    assert landscape is not None
    rows = -(-len(landscape.temperatures) // 2)
    figure = _figure(0.6 + 1.55 * rows)
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False)
    order = landscape.distance.argsort()
    distance = landscape.distance[order].numpy()
    losses = landscape.symmetric[order].T.numpy()
    rest = float(survey.gap.distance)
    for axes, temperature, loss in zip(
        panels.flat, landscape.temperatures.tolist(), losses, strict=False
    ):
        lowest = loss.argmin()
        axes.axvline(rest, label="the gap as it is", **DASHED)
        axes.plot(distance, loss, color=BLUE, linewidth=1.5)
        axes.plot(distance[lowest], loss[lowest], "o", color=ORANGE, label="lowest loss tried")
        axes.plot(*_other_minima(distance, loss), "o", color=ORANGE, fillstyle="none")
        axes.set_title(f"τ = {inverse(temperature)}", loc="left", size=9, weight="bold")
        words = f"{number(loss[lowest])} at {number(distance[lowest])}"
        axes.set_title(words, loc="right", size=8, color=ORANGE)
        # a flat loss is drawn flat
        room = max(0.1 * np.ptp(loss), 0.005 * loss.max()) or 1.0
        axes.set_ylim(loss.min() - room, loss.max() + room)
        axes.ticklabel_format(useOffset=False)
        tidy(axes)
    for axes in panels.flat[len(losses) :]:
        axes.set_axis_off()
    figure.supxlabel("distance of the means (below 0: past each other)", size=9)
    figure.supylabel("loss", size=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    return figure


def _other_minima(distance: Curve, loss: Curve) -> tuple[Curve, Curve]:
    """Where the loss is below both neighbours, but not the lowest of all."""
    inner = loss[1:-1]
    found = 1 + np.flatnonzero((inner < loss[:-2]) & (inner < loss[2:]))
    found = found[found != loss.argmin()]
    return distance[found], loss[found]


@_styled
def plot_ranks(survey: Survey) -> Figure:
    """How often the right match is among the first k, both ways."""
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    figure = _figure()
    axes = figure.subplots()
    x, y = (short(side.name, 20) for side in (survey.x, survey.y))
    there, back = survey.retrieval.x_to_y, survey.retrieval.y_to_x
    for way, words, color in ((there, f"{x} to {y}", BLUE), (back, f"{y} to {x}", ORANGE)):
        if way is None:
            continue
        share = (way.found / way.queries).numpy()
        label = f"{words}: {percent(share[0])} at once"
        axes.plot(way.ks.numpy(), share, color=color, linewidth=1.5, label=label)
    if there is not None and not survey.labelled:
        ks = there.ks.numpy()
        axes.plot(ks, ks / there.candidates, label="by chance", **DASHED)
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("k nearest candidates")
    axes.set_ylabel("queries whose match is there")
    return _finished(figure, axes)


def _finished(figure: Figure, axes: Axes, scale: float = 1) -> Figure:
    """Labels above the axes, in the colours of what they name, where they hide nothing."""
    tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    where: Style = {"loc": "outside upper left", "frameon": False, "handlelength": 1.2}
    figure.legend(handles, labels, markerscale=scale, **where)
    return figure


def drawn(survey: Survey) -> dict[str, bytes]:
    """Every picture the survey has numbers for, as PNG and as SVG, by the name of its file."""
    figures: dict[str, Callable[[Survey], Figure]] = {}
    if survey.others.histogram is not None:
        if _sets(survey):
            figures["pairs"] = plot_pairs
        figures["cone"] = plot_cone
    if len(survey.pca.variance_ratio) > 1:
        figures["cloud"] = plot_cloud
    if survey.retrieval.x_to_y is not None or survey.retrieval.y_to_x is not None:
        figures["ranks"] = plot_ranks
    if survey.landscape is not None:
        figures["landscape"] = plot_landscape
    files: dict[str, bytes] = {}
    for name, plot in figures.items():
        figure = plot(survey)
        files |= {f"{name}.png": rendered(figure, "png"), f"{name}.svg": rendered(figure, "svg")}
    return files
