"""The passes of `survey`: each folds over blocks of rows, or of pairs, and never changes what it
was given, so that it can stop anywhere and go on.

A pass holds plain dicts of numbers, tensors and PairwiseStats: what a state file can hold.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.gap._sides import Block, Matches, Side
from mmfast.gap.files import Rows
from mmfast.ops._statistics import PairwiseStats, about
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.pairwise_rank import pairwise_rank
from mmfast.ops.pairwise_stats import pairwise_stats
from mmfast.ops.shift_landscape import moved_sums, shift_landscape

# of the uniformity, as published
T = 2.0
# rows that are held in float64 at once
ROWS = 4096
# columns that keep all pairs but the own ones out of a sweep
_ALONE = 64
Held = dict[str, Any]


def add(a: PairwiseStats | None, b: PairwiseStats) -> PairwiseStats:
    return b if a is None else a + b


def look(rows: Rows, held: Held, block: Block) -> Held:
    """Numbers of the rows that are not finite, and of those of zeros."""
    start, stop = block
    x = rows.read(start, stop)
    found = {"broken": ~x.isfinite().all(1), "zero": (x == 0).all(1)}
    return {
        name: torch.cat([held[name], start + flags.nonzero()[:, 0]])
        for name, flags in found.items()
    }


def moments(side: Side, held: Held, block: Block) -> Held:
    """Sums of unit rows [D] and of their products [D, D], in float64."""
    total, square = held["sum"].clone(), held["square"].clone()
    for start in range(*block, ROWS):
        unit = F.normalize(side.raw(start, min(start + ROWS, block[1])).double(), dim=1)
        total += unit.sum(0)
        square.addmm_(unit.T, unit)
    return {"sum": total, "square": square}


@dataclass(frozen=True)
class Data:
    """Two sides, which of their rows belong together, and what is asked."""

    x: Side
    y: Side
    matches: Matches
    bins: int
    logit_scale: float

    def stats(self, x: Tensor, y: Tensor | None, here: tuple[int, int]) -> PairwiseStats:
        """Of two blocks whose first rows have the numbers `here`."""
        row, column = here
        offset = 0 if y is None else column
        return pairwise_stats(x, y, bins=self.bins, row_offset=row, column_offset=offset)


def own_scores(q: Tensor, k: Tensor) -> Tensor:
    """<q_i, k_i> [n], with the compiled core to the bit what the sweep of all pairs makes of them.

    A sweep has no diagonal: columns that add 0 to the own pair and push all others below it leave
    one maximum in every row.
    """
    found = []
    for start in range(0, len(q), _ALONE):
        p, r = q[start : start + _ALONE], k[start : start + _ALONE]
        one = torch.eye(len(p), dtype=p.dtype)
        largest, _, _ = pairwise_rank(torch.cat([p, 4 * one - 4], 1), torch.cat([r, one], 1))
        found.append(largest)
    return torch.cat(found)


def together(data: Data, held: Held, block: Block) -> Held:
    """Pairs that belong together: all of them, and the first one of every row.

    held: own, first: PairwiseStats of their cosines. squares: sums of squared distances of the
    first ones of x and of y. best: the largest cosine of each x, by block, and of each y. score:
    that of its first one.
    """
    start, stop = block
    new = {**held, "y_best": held["y_best"].clone(), "y_score": held["y_score"].clone()}
    best = torch.full((stop - start,), -math.inf, dtype=data.x.dtype)
    score = torch.full_like(best, math.nan)
    for i, j in data.matches.pairs(start, stop, data.x.size):
        u, v = data.x.take(i), data.y.take(j)
        s = own_scores(u, v)
        x_first, y_first = data.matches.y_of_x[i] == j, data.matches.x_of_y[j] == i
        new["own"] = add(new["own"], _of_scores(data, s, i, j))
        if x_first.any():
            firsts = (t[x_first] for t in (s, i, j))
            new["first"] = add(new["first"], _of_scores(data, *firsts))
        squares = (u - v).double().square().sum(1)
        sums = torch.stack([squares[x_first].sum(), squares[y_first].sum()])
        new["squares"] = new["squares"] + sums
        best.scatter_reduce_(0, i - start, s, "amax")
        new["y_best"].scatter_reduce_(0, j, s, "amax")
        score[i[x_first] - start] = s[x_first]
        new["y_score"][j[y_first]] = s[y_first]
    new["x_best"], new["x_score"] = [*held["x_best"], best], [*held["x_score"], score]
    return new


def _of_scores(data: Data, scores: Tensor, i: Tensor, j: Tensor) -> PairwiseStats:
    found = data.stats(scores[:, None], torch.ones(1, 1, dtype=scores.dtype), (0, 0))
    least, most = ((int(i[at]), int(j[at])) for at in (found.argmin[0], found.argmax[0]))
    return replace(found, argmin=least, argmax=most)


def within(data: Data, side: Side, held: Held, at: tuple[int, int]) -> Held:
    """Pairs of distinct rows of one side: their statistics, and log sum exp(2 t s) over both
    orders."""
    row, column = at
    a, here = side.unit(row), (row * side.size, column * side.size)
    if row == column:
        own = torch.arange(len(a))
        stats = data.stats(a, None, here)
        logs = pairwise_lse(a, a, 2 * T, q_ids=own, k_ids=own).double().logsumexp(0)
    else:
        b = side.unit(column)
        stats = data.stats(a, b, here)
        logs = pairwise_lse(a, b, 2 * T).double().logsumexp(0) + math.log(2)
    return {"stats": add(held["stats"], stats), "logs": torch.logaddexp(held["logs"], logs)}


def between(data: Data, thresholds: tuple[Tensor, Tensor], held: Held, at: tuple[int, int]) -> Held:
    """Pairs of x and y.

    held: stats: of all. least, most: (cosine, row, column) of those that do not belong together.
    logs: as in `within`. x, y: by block, log sum exp of the scores of the wrong ones, the largest
    of them, and how many exceed the row's threshold.
    """
    row, column = at
    u, v = data.x.unit(row), data.y.unit(column)
    here = (row * data.x.size, column * data.y.size)
    rows, columns = (
        slice(first, first + len(side)) for first, side in zip(here, (u, v), strict=True)
    )
    x_ids, y_ids = data.matches.x_ids[rows], data.matches.y_ids[columns]
    stats = data.stats(u, v, here)
    x_logs, y_logs = pairwise_lse(u, v, data.logit_scale, q_ids=x_ids, k_ids=y_ids, columns=True)
    above = thresholds[0][rows], thresholds[1][columns]
    x_most, x_at, x_above = pairwise_rank(u, v, threshold=above[0], q_ids=x_ids, k_ids=y_ids)
    y_most, _, y_above = pairwise_rank(v, u, threshold=above[1], q_ids=y_ids, k_ids=x_ids)
    logs = pairwise_lse(u, v, 2 * T).double().logsumexp(0) + math.log(2)
    most = _placed(x_most, x_at, here)
    least = (stats.min, *stats.argmin)
    if data.matches.x_ids[least[1]] == data.matches.y_ids[least[2]]:
        x_least, x_at, _ = pairwise_rank(-u, v, q_ids=x_ids, k_ids=y_ids)
        value, at_row, at_column = _placed(x_least, x_at, here)
        least = (-value, at_row, at_column)
    found = {"x": (row, x_logs, x_most, x_above), "y": (column, y_logs, y_most, y_above)}
    return {
        "stats": add(held["stats"], stats),
        "least": min(held["least"], least),
        "most": min(held["most"], most, key=lambda it: (-it[0], *it[1:])),
        "logs": torch.logaddexp(held["logs"], logs),
        **{side: _ranked(held[side], *parts) for side, parts in found.items()},
    }


def _placed(largest: Tensor, index: Tensor, here: tuple[int, int]) -> tuple[float, int, int]:
    row = int(largest.argmax())
    return float(largest[row]), here[0] + row, here[1] + int(index[row])


def _ranked(held: dict[int, Any], block: int, logs: Tensor, most: Tensor, above: Tensor) -> Any:
    if block in held:
        was = held[block]
        logs, above = torch.logaddexp(was[0], logs.double()), was[2] + above
        most = torch.maximum(was[1], most)
    return {**held, block: (logs.double(), most, above)}


def without(
    everything: PairwiseStats, part: PairwiseStats | None, least: Any, most: Any
) -> PairwiseStats:
    """Statistics of all pairs but those of `part`, whose extremes are known."""
    if part is None:
        return everything
    count = everything.count - part.count
    if count == 0:
        moments = (math.nan,) * 4
        least, most = (math.inf, -1, -1), (-math.inf, -1, -1)
    else:
        # about the common mean, then about their own
        theirs = about((0.0, *part.moments[1:]), part.mean - everything.mean)
        weight = part.count / count
        whole = (0.0, *everything.moments[1:])
        m1, m2, m3, m4 = (p + weight * (p - q) for p, q in zip(whole, theirs, strict=True))
        _, square, cube, fourth = about((m1, m2, m3, m4), -m1)
        # rounding takes a hair more than there is where all are equal
        moments = (everything.mean + m1, max(square, 0.0), cube, max(fourth, 0.0))
    histogram = everything.histogram
    # without the compiled core rounding may put a pair into another bin than the sweep did
    if histogram is not None and part.histogram is not None:
        histogram = (histogram - part.histogram).clamp_min(0)
    return replace(
        everything,
        count=count,
        moments=moments,
        min=least[0],
        max=most[0],
        argmin=tuple(least[1:]),
        argmax=tuple(most[1:]),
        histogram=histogram,
        below=max(0, everything.below - part.below),
        above=max(0, everything.above - part.above),
    )


@dataclass(frozen=True)
class Shifts:
    """What `landscape` moves: pairs (i, j), along a direction [D]."""

    i: Tensor
    j: Tensor
    direction: Tensor
    shifts: list[float]
    temperatures: list[float]
    chunk: int


def landscape(data: Data, ask: Shifts, held: Held, block: Block) -> Held:
    """Sums over pairs: losses [2, L, T], moved unit rows [2, L, D] in float64."""
    x, y = (side.take_raw(at[slice(*block)]) for side, at in ((data.x, ask.i), (data.y, ask.j)))
    found = shift_landscape(
        x, y, ask.shifts, ask.temperatures, direction=ask.direction, chunk=ask.chunk
    )
    losses = torch.stack([found.image_to_text, found.text_to_image]).double()
    return {
        "losses": held["losses"] + losses * len(x),
        "centres": held["centres"] + moved_sums(x, y, ask.shifts, ask.direction),
    }
