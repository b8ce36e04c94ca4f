"""From two sides to a `Survey`: each pass over its blocks, and what its sums say."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.gap._sides import HELD, Block, Side, cut, grid, triangle
from mmfast.gap.files import Rows
from mmfast.gap.measures import Gap
from mmfast.gap.survey import passes
from mmfast.gap.survey.facts import PCA, Retrieval, SideFacts, Survey, Ways
from mmfast.gap.survey.passes import Data, Held, Shifts
from mmfast.gap.survey.state import Steps
from mmfast.losses._terms import softplus
from mmfast.ops._inputs import type_name
from mmfast.ops._statistics import PairwiseStats
from mmfast.ops.shift_landscape import Landscape

# pairs the published loss is taken over at a time
CHUNK = 50
KS = (1, 5, 10)
# rows of each side that are drawn
CLOUD = 2000
_LOT = 256
SHOWN = 10
# a gap that is no longer is one of rounding
_NO_GAP = 1e-14


# about how many inner products take as long as: reading a row; a pair of rows in each pass; what a
# row of the moments takes for each column; a pair that belongs together; an exponential, by width
_READ, _WITHIN, _BETWEEN, _MOMENT, _TOGETHER, _EXP = 200, 2, 5, 3, 600, 150


def cost(n: int, m: int, width: int, size: int, pairs: int, losses: int) -> float:
    """Of all passes, in inner products: `pairs` belong together, `losses` make the landscape."""
    rows = (n + m) * (2 * _READ + _MOMENT * width) + n * _shift_cost(width, losses)
    # blocks with themselves and with later ones
    within = sum((k * k + sum(_rows_of(b) ** 2 for b in cut(k, size))) / 2 for k in (n, m))
    return rows + _TOGETHER * pairs + _WITHIN * within + _BETWEEN * n * m


def _shift_cost(width: int, losses: int) -> float:
    return 2 * _READ + CHUNK * (1 + _EXP * losses / width)


def _rows_of(block: Block) -> int:
    return block[1] - block[0]


def look(steps: Steps, name: str, rows: Rows, size: int) -> Held:
    """Which rows are not finite, which are zeros."""
    none = torch.empty(0, dtype=torch.int64)
    return steps.fold(
        f"look {name}", cut(len(rows), size), {"broken": none, "zero": none},
        partial(passes.look, rows), lambda block: _READ * _rows_of(block),
    )  # fmt: skip


def assemble(
    steps: Steps, data: Data, looked: tuple[Held, ...], options: dict[str, Any], labelled: bool
) -> Survey:
    """All passes but the first look, and what they found."""
    sides = (data.x, data.y)
    sums = [_moments(steps, name, side) for name, side in zip("xy", sides, strict=True)]
    means = [held["sum"] / len(side) for held, side in zip(sums, sides, strict=True)]
    gap = Gap(*means)
    own = _together(steps, data)
    insides = [_within(steps, data, name, side) for name, side in zip("xy", sides, strict=True)]
    outside = _between(steps, data, own)
    zero = [_zero_rows(side, held) for side, held in zip(sides, looked, strict=True)]
    found, reason = _landscape(steps, data, gap, zero, options)
    partners = (data.matches.y_of_x >= 0, data.matches.x_of_y >= 0)
    facts = [
        SideFacts(
            name=side.rows.name,
            rows=len(side),
            width=side.width,
            dtype=type_name(side.rows.dtype),
            nan_rows=len(held["broken"]),
            first_nan_rows=tuple(held["broken"][:SHOWN].tolist()),
            zero_rows=int(nothing.sum()),
            alone=int((~has).sum()),
            mean=mean,
            cosines=_renumbered(inside["stats"], side, side),
            uniformity=_uniformity(inside["logs"], len(side)),
        )
        for side, held, nothing, has, mean, inside in zip(
            sides, looked, zero, partners, means, insides, strict=True
        )
    ]
    logs = torch.stack([insides[0]["logs"], insides[1]["logs"], outside["logs"]]).logsumexp(0)
    others = passes.without(outside["stats"], own["own"], outside["least"], outside["most"])
    first = own["first"]
    paired = int(partners[0].sum())
    ways = [
        _way(data, outside[name], own, name, has, i)
        for i, (name, has) in enumerate(zip("xy", partners, strict=True))
    ]
    return Survey(
        x=facts[0],
        y=facts[1],
        labelled=labelled,
        paired=paired,
        pairs=None if first is None else _renumbered(first, data.x, data.y),
        others=_renumbered(others, data.x, data.y),
        gap=gap,
        alignment=float(own["squares"][0]) / paired if paired else math.nan,
        uniformity=_uniformity(logs, len(data.x) + len(data.y)),
        relative_alignment=Ways(ways[0][0], ways[1][0]),
        pca=_pca(data, sums, gap),
        retrieval=Ways(ways[0][1], ways[1][1]),
        loss=Ways(ways[0][2], ways[1][2]),
        landscape=found,
        notes=tuple(_notes(facts, labelled, reason)),
        seconds=steps.seconds,
        options=options,
    )


def _moments(steps: Steps, name: str, side: Side) -> Held:
    D = side.width
    start = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in
             (("sum", (D,)), ("square", (D, D)))}  # fmt: skip
    return steps.fold(
        f"moments {name}", side.blocks, start,
        partial(passes.moments, side),
        lambda block: (_READ + _MOMENT * D) * _rows_of(block),
    )  # fmt: skip


def _together(steps: Steps, data: Data) -> Held:
    M = len(data.y)
    start: Held = {
        "own": None,
        "first": None,
        "squares": torch.zeros(2, dtype=torch.float64),
        "x_best": [],
        "x_score": [],
        "y_best": torch.full((M,), -math.inf, dtype=data.x.dtype),
        "y_score": torch.full((M,), math.nan, dtype=data.x.dtype),
    }
    held = steps.fold(
        "together", data.x.blocks, start,
        partial(passes.together, data), lambda block: _TOGETHER * data.matches.count(*block),
    )  # fmt: skip
    return {**held, "x_best": torch.cat(held["x_best"]), "x_score": torch.cat(held["x_score"])}


def _area(x: Side, y: Side, at: tuple[int, int]) -> int:
    return _rows_of(x.blocks[at[0]]) * _rows_of(y.blocks[at[1]])


def _within(steps: Steps, data: Data, name: str, side: Side) -> Held:
    start = {"stats": None, "logs": torch.tensor(-math.inf, dtype=torch.float64)}
    return steps.fold(
        f"within {name}", triangle(side), start,
        partial(passes.within, data, side), lambda at: _WITHIN * _area(side, side, at),
    )  # fmt: skip


def _between(steps: Steps, data: Data, own: Held) -> Held:
    # a difference that the rounding of the products explains is none
    rounding = torch.finfo(data.x.dtype).eps * data.x.width**0.5
    thresholds = (own["x_best"] + rounding, own["y_best"] + rounding)
    start: Held = {
        "stats": None,
        "least": (math.inf, -1, -1),
        "most": (-math.inf, -1, -1),
        "logs": torch.tensor(-math.inf, dtype=torch.float64),
        "x": {},
        "y": {},
    }
    held = steps.fold(
        "between", grid(data.x, data.y), start,
        partial(passes.between, data, thresholds),
        lambda at: _BETWEEN * _area(data.x, data.y, at),
    )  # fmt: skip
    joined = {
        name: [
            torch.cat(parts)
            for parts in zip(*(held[name][i] for i in sorted(held[name])), strict=True)
        ]
        for name in "xy"
    }
    return {**held, **joined}


def _uniformity(logs: Tensor, n: int) -> float:
    """From log sum exp(2 t s) over all ordered pairs of n rows; |x - y|^2 = 2 - 2 s."""
    return float(logs) - 2 * passes.T - math.log(n * (n - 1))


def _way(
    data: Data, ranked: Sequence[Tensor], own: Held, name: str, has: Tensor, i: int
) -> tuple[float, Retrieval | None, float]:
    """Relative alignment, retrieval and loss of the rows of one side among those of the other."""
    logs, largest, above = (part[has] for part in ranked)
    n = len(logs)
    if n == 0:
        return math.nan, None, math.nan
    nearest = 2 - 2 * largest.double()
    relative = float(own["squares"][i]) / n - float(nearest.mean())
    score = own[f"{name}_score"][has].double()
    loss = float(softplus(logs - data.logit_scale * score).mean())
    ranks = (above + 1).sort().values
    candidates = len(data.y) if i == 0 else len(data.x)
    ks = torch.from_numpy(np.unique(np.geomspace(1, candidates, 200).round().astype(np.int64)))
    recall = {k: int((ranks <= k).sum()) / n for k in KS}
    median = float(np.median(ranks.numpy()))
    found = torch.searchsorted(ranks, ks, right=True)
    return relative, Retrieval(n, candidates, recall, median, ks, found), loss


def _renumbered(stats: PairwiseStats, x: Side, y: Side) -> PairwiseStats:
    """Places among all rows of the files, skipped ones counted."""
    least, most = ((x.number(i), y.number(j)) for i, j in (stats.argmin, stats.argmax))
    return replace(stats, argmin=least, argmax=most)


def _zero_rows(side: Side, looked: Held) -> Tensor:
    """Which of the rows that are used are zeros, bool [N]."""
    zero = torch.zeros(len(side.rows), dtype=torch.bool)
    zero[looked["zero"]] = True
    return zero if side.kept is None else zero[side.kept]


def _landscape(
    steps: Steps, data: Data, gap: Gap, zero: Sequence[Tensor], options: dict[str, Any]
) -> tuple[Landscape | None, str | None]:
    """The landscape and None, or None and why there is none."""
    i = (data.matches.y_of_x >= 0).nonzero()[:, 0]
    i = i[~(zero[0][i] | zero[1][data.matches.y_of_x[i]])]
    if len(i) == 0:
        return None, "No loss landscape: no pair of rows that are not zeros belongs together."
    if float(gap.distance) <= _NO_GAP:
        return None, "No loss landscape: both means are the same, there is no gap to shift along."
    moves, taus = options["shifts"], options["temperatures"]
    ask = Shifts(i, data.matches.y_of_x[i], gap.direction, moves, taus, CHUNK)
    L, D = len(moves), data.x.width
    row = 16 * L * (len(taus) + 4) + 8 * HELD * D
    size = min(data.x.size, options["budget"] // row) // CHUNK * CHUNK
    start = {
        "losses": torch.zeros(2, L, len(taus), dtype=torch.float64),
        "centres": torch.zeros(2, L, D, dtype=torch.float64),
    }
    held = steps.fold(
        "landscape", cut(len(i), max(CHUNK, size)), start,
        partial(passes.landscape, data, ask),
        lambda block: _shift_cost(D, L * len(taus)) * _rows_of(block),
    )  # fmt: skip
    losses, centres = held["losses"] / len(i), held["centres"] / len(i)
    left = centres[0] - centres[1]
    distance = torch.where(left @ gap.direction < 0, -1, 1) * left.norm(dim=1)
    shifts, temperatures = (torch.tensor(it, dtype=torch.float64) for it in (moves, taus))
    return Landscape(shifts, temperatures, losses[0], losses[1], distance), None


def _pca(data: Data, sums: Sequence[Held], gap: Gap) -> PCA:
    n = len(data.x) + len(data.y)
    D = data.x.width
    centre = (sums[0]["sum"] + sums[1]["sum"]) / n
    spread = (sums[0]["square"] + sums[1]["square"]) / n - torch.outer(centre, centre)
    values, vectors = torch.linalg.eigh(spread)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).T
    axes = torch.zeros(2, D, dtype=torch.float64)
    axes[: min(2, D)] = vectors[:2]
    axes[axes @ gap.vector < 0] *= -1
    points = []
    for side in (data.x, data.y):
        rows = torch.linspace(0, len(side) - 1, min(CLOUD, len(side)), dtype=torch.float64)
        parts = [side.take(rows[a:b].long()).double() for a, b in cut(len(rows), _LOT)]
        points.append(torch.cat([(part - centre) @ axes.T for part in parts]))
    return PCA(values[:6] / values.sum(), centre, axes, *points)


def _notes(facts: Sequence[SideFacts], labelled: bool, reason: str | None) -> Iterator[str]:
    for side in facts:
        if side.nan_rows:
            partners = "" if labelled else " and their partners"
            yield f"{side.name}: {side.nan_rows} rows with NaN or infinity{partners} are left out."
        if side.zero_rows:
            yield (
                f"{side.name}: {side.zero_rows} rows of zeros are kept, with cosine 0 to all, "
                "but not in the loss landscape."
            )
        if side.alone:
            yield (
                f"{side.name}: {side.alone} rows have a label the other side lacks, and are left "
                "out of all that is said of pairs."
            )
    if reason:
        yield reason
