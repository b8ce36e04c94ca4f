"""Pictures of trainings, as PNG files. Colours are told apart by colour-blind eyes too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import Pairs
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mmfast.gap.report.pictures import ARROW, BLUE, GREY, INK, ORANGE, tidy


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def loss_curves(path: Path, fast: list[float], dense: list[float]) -> Path:
    """Both losses step by step, and below how far they are apart."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = np.arange(1, len(fast) + 1)
    above.plot(steps, fast, color=BLUE, linewidth=4, alpha=0.5, label="mmfast.clip_loss")
    above.plot(steps, dense, color=ORANGE, linewidth=1.2, linestyle="--", label="dense loss")
    above.set_ylabel("training loss")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    above.set_title("One seed, two losses: the same training", loc="left", weight="bold")
    # equal values have no place on a logarithmic axis and leave a hole
    apart = np.abs(np.subtract(fast, dense))
    below.plot(steps, np.where(apart > 0, apart, np.nan), ".", color=INK, markersize=3)
    below.set_yscale("log")
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    for axes in (above, below):
        tidy(axes)
    return save(figure, path)


def principal_plane(image: Tensor, text: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both modalities [N, D] in the plane [N, 2] of their largest common variance."""
    both = torch.cat([image, text])
    centre = both.mean(0)
    _, _, axes = torch.linalg.svd(both - centre, full_matrices=False)
    x, y = ((rows - centre) @ axes[:2].T for rows in (image, text))
    # a principal axis has no sign of its own: images go to the left
    sign = torch.where(x.mean(0) > y.mean(0), -1.0, 1.0)
    return (x * sign).numpy(), (y * sign).numpy()


def joint_space(path: Path, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Path:
    """Both modalities before and after training, with an arrow between their means."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    figure.suptitle("The modality gap: from the mean picture to the mean name", weight="bold")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    states = {"Before training": before, "After training": after}
    for axes, (when, (image, text)) in zip(panels, states.items(), strict=True):
        x, y = principal_plane(image, text)
        axes.plot(*np.stack([x, y]).transpose(2, 0, 1), color=GREY, linewidth=0.4, alpha=0.5)
        style = {"s": 16, "alpha": 0.75, "linewidths": 0}
        axes.scatter(*x.T, color=BLUE, marker="o", label="picture", **style)
        axes.scatter(*y.T, color=ORANGE, marker="^", label="name", **style)
        gap = (image.mean(0) - text.mean(0)).norm().item()
        seen = float(np.linalg.norm(x.mean(0) - y.mean(0)))
        means = {"s": 90, "edgecolor": "white", "linewidth": 1.5, "zorder": 4}
        axes.scatter(*x.mean(0), color=BLUE, marker="o", **means)
        axes.scatter(*y.mean(0), color=ORANGE, marker="^", **means)
        axes.annotate("", y.mean(0), x.mean(0), arrowprops=ARROW, zorder=5)
        axes.set_title(f"{when}: gap {gap:.2f} ({seen:.2f} in this plane)", loc="left", size=11.5)
        axes.set_xlabel("first principal component")
        axes.set_aspect("equal", adjustable="box")
        tidy(axes)
    panels[0].set_ylabel("second principal component")
    panels[0].legend(loc="upper center", markerscale=1.6, framealpha=1)
    return save(figure, path)


def nearest_captions(
    path: Path, pairs: Pairs, image: Tensor, text: Tensor, count: int = 10, top: int = 5
) -> Path:
    """The first held-out emoji, each with the captions that its picture is closest to."""
    scores = image[:count] @ text.T
    rows = (count + 1) // 2
    figure = Figure(figsize=(12, 1.75 * rows + 0.6), layout="constrained")
    figure.suptitle(
        f"The first {count} held-out emoji and the captions nearest to each, "
        f"of {len(pairs)} (cosine; its own in blue)",
        weight="bold",
    )
    # the empty middle column keeps the two halves apart
    grid = figure.subplots(rows, 5, width_ratios=(1, 3, 0.2, 1, 3), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = grid[:, [0, 1, 3, 4]].reshape(-1, 2)
    for row, (picture, bars) in enumerate(cells[:count]):
        nearest = scores[row].argsort(descending=True)[:top].tolist()
        rank = 1 + int((scores[row] > scores[row, row]).sum())
        picture.imshow(pairs.thumbnails[row], interpolation="lanczos")
        bars.set_title(f"{short(pairs.names[row], 40)}: found at rank {rank}", loc="left", size=9.5)
        bars.set_xlim(0, 1)
        bars.set_ylim(top - 0.5, -0.5)
        for place, caption in enumerate(nearest):
            cosine, own = scores[row, caption].item(), caption == row
            bars.barh(place, cosine, height=0.86, color="#9CCBE8" if own else "#E4E4E4")
            # names come from outside: a dollar in one of them is no formula
            style = {"va": "center", "size": 8.5, "color": INK, "parse_math": False}
            weight = "bold" if own else "normal"
            bars.text(0.01, place, short(pairs.names[caption], 44), weight=weight, **style)
            bars.text(1, place, f"{cosine:.2f}", ha="right", weight=weight, **style)
    return save(figure, path)


def uniformity_and_alignment(path: Path, results: dict[str, dict[str, float]]) -> Path:
    """One point a loss, better towards the lower left, as Wang and Isola (2020) draw it."""
    names = sorted(results, key=lambda name: results[name]["alignment"])
    x, y = (np.array([results[name][key] for name in names]) for key in ("uniformity", "alignment"))
    ways = "recall@1 image to text", "recall@1 text to image"
    found = [np.mean([results[name][way] for way in ways]) for name in names]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    style = {"cmap": "cividis", "s": 70, "edgecolor": "white", "linewidth": 0.8, "zorder": 3}
    points = axes.scatter(x, y, c=found, **style)
    figure.colorbar(points, label="recall@1, mean of both ways")
    # labels in a column of their own: losses that learn alike have points that overlap
    places = apart(y, 0.05 * max(np.ptp(y), 0.1))
    edge = x.max() + 0.12 * max(np.ptp(x), 0.1)
    for name, *point, place in zip(names, x, y, places, strict=True):
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(name, point, (edge, place), va="center", color=INK, arrowprops=line)
    axes.set_xlim(right=edge + 0.12 * max(np.ptp(x), 0.1))
    axes.set_ylim(top=max(y.max(), places[-1]) + 0.05 * max(np.ptp(y), 0.1))
    axes.set_xlabel("uniformity, mean of both modalities (lower: better spread)")
    axes.set_ylabel("alignment (lower: pairs closer)")
    axes.set_title("What each loss makes of the sphere", loc="left", weight="bold")
    better = {"xycoords": "axes fraction", "textcoords": "axes fraction", "arrowprops": ARROW}
    axes.annotate("better", (0.02, 0.02), (0.12, 0.14), **better)
    tidy(axes)
    return save(figure, path)


@dataclass(frozen=True)
class CodeMeaning:
    """What fires a code most: (picture, row, column) of patches, and words, best first."""

    code: int
    patches: list[tuple[int, int, int]]
    words: list[str]


def code_meanings(path: Path, meanings: list[CodeMeaning], pairs: Pairs, patch: int) -> Path:
    """One code a line: the pictures whose patch, in the box, fires it most, and the words."""
    columns = max(len(meaning.patches) for meaning in meanings)
    figure = Figure(figsize=(1.05 * columns + 4, 1.1 * len(meanings) + 0.6), layout="constrained")
    title = "What some codes mean: the patches and words that fire them most"
    figure.suptitle(title, weight="bold")
    widths = (1,) * columns + (3.6,)
    grid = figure.subplots(len(meanings), columns + 1, width_ratios=widths, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, meaning in zip(grid, meanings, strict=True):
        for axes, (picture, row, column) in zip(line, meaning.patches, strict=False):
            axes.imshow(pairs.thumbnails[picture], interpolation="lanczos")
            corner = (column * patch - 0.5, row * patch - 0.5)
            style = {"fill": False, "edgecolor": ORANGE, "linewidth": 2}
            axes.add_patch(Rectangle(corner, patch, patch, **style))
        text = line[-1]
        text.text(0, 0.8, f"code {meaning.code}", size=9, color=GREY, transform=text.transAxes)
        words = short(", ".join(meaning.words), 90)
        style = {"size": 10.5, "color": INK, "parse_math": False, "wrap": True, "va": "top"}
        text.text(0, 0.65, words, transform=text.transAxes, **style)
    return save(figure, path)


def apart(heights: np.ndarray, least: float) -> np.ndarray:
    """Rising heights, moved up so far that neighbours are at least this far apart."""
    steps = least * np.arange(len(heights))
    return np.maximum.accumulate(heights - steps) + steps


def short(name: str, length: int) -> str:
    """The name, cut where it is too long for its place."""
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"
