"""What a visit of all pairs found, and how two such findings merge.

Moments merge as in Pebay, Formulas for robust, one-pass parallel computation of covariances and
arbitrary-order statistical moments (SAND2008-6212): each side's are moved to the common mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Moments = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class PairwiseStats:
    """What `pairwise_stats` found; `+` merges what it found of other pairs.

    Attributes:
        count: pairs that have a number.
        nan: pairs that have none, left out of all else.
        moments: the mean, and the means of (s - mean)^p for p = 2, 3 and 4; NaN if count is 0.
        min: the least product; inf if count is 0.
        max: the largest product; -inf if count is 0.
        argmin: its row in x and in y, offsets added, the lowest row and then the lowest column of
            equal ones; (-1, -1) if count is 0.
        argmax: the same of the largest.
        histogram: int64 [bins], how many have edges[b] <= s < edges[b + 1], the last bin closed;
            None without one.
        below: how many lie under the lowest edge.
        above: how many lie over the highest.
        edges: float64 [bins + 1], or None.
    """

    count: int
    nan: int
    moments: Moments
    min: float
    max: float
    argmin: tuple[int, int]
    argmax: tuple[int, int]
    histogram: Tensor | None = None
    edges: Tensor | None = None
    below: int = 0
    above: int = 0

    @property
    def mean(self) -> float:
        """The mean of the products; NaN if there are none."""
        return self.moments[0]

    @property
    def std(self) -> float:
        """Their standard deviation with divisor count - 1, as published; NaN of fewer than two."""
        if self.count < 2:
            return math.nan
        return math.sqrt(self.moments[1] * (self.count / (self.count - 1)))

    def merge(self, other: PairwiseStats) -> PairwiseStats:
        """Those of the pairs of both. Counts and extremes are exact.

        Raises:
            ValueError: the histograms have different edges, or only one has any.
        """
        if not _same_edges(self.edges, other.edges):
            raise ValueError("PairwiseStats: only histograms over the same edges can be merged")
        least = min((self, other), key=lambda s: (s.min, s.count == 0, s.argmin))
        most = min((self, other), key=lambda s: (-s.max, s.count == 0, s.argmax))
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return PairwiseStats(
            count=self.count + other.count,
            nan=self.nan + other.nan,
            moments=_merged(self, other),
            min=least.min,
            max=most.max,
            argmin=least.argmin,
            argmax=most.argmax,
            histogram=histogram,
            edges=self.edges,
            below=self.below + other.below,
            above=self.above + other.above,
        )

    __add__ = merge

    def quantile(self, p: float) -> float:
        """The least s that a share of p of the products does not exceed, from the histogram.

        Off by at most half the width of a bin: it is the middle of `quantile_bounds(p)`.
        """
        low, high = self.quantile_bounds(p)
        return low if low == high else low / 2 + high / 2

    def quantile_bounds(self, p: float) -> tuple[float, float]:
        """Between what two numbers the quantile lies.

        The edges of a bin; where `min` or `max` bounds it tighter, that; below and above the edges
        the stretch between them. Both are the extreme itself for the first and the last of all.

        Raises:
            ValueError: p outside of [0, 1], no histogram, no products.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"PairwiseStats: p must be from 0 to 1, got {p}")
        if self.histogram is None or self.edges is None:
            raise ValueError("PairwiseStats: quantiles need a histogram, and there is none")
        if self.count == 0:
            raise ValueError("PairwiseStats: no quantile of no products")
        rank = max(1, math.ceil(p * self.count))
        if rank == 1:
            return self.min, self.min
        if rank >= self.count:
            return self.max, self.max
        ends = self.histogram.cumsum(0) + self.below
        edges = [self.min, *self.edges.tolist(), self.max]
        at = 0 if rank <= self.below else 1 + int(torch.searchsorted(ends, rank))
        return max(edges[at], self.min), min(edges[at + 1], self.max)


def _same_edges(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def about(moments: Moments, by: float) -> Moments:
    """Means of v, v^2, v^3, v^4 become those of v + by."""
    m1, m2, m3, m4 = moments
    return (
        m1 + by,
        m2 + by * (2 * m1 + by),
        m3 + by * (3 * m2 + by * (3 * m1 + by)),
        m4 + by * (4 * m3 + by * (6 * m2 + by * (4 * m1 + by))),
    )


def _merged(a: PairwiseStats, b: PairwiseStats) -> Moments:
    if a.count == 0 or b.count == 0:
        return b.moments if a.count == 0 else a.moments
    share = b.count / (a.count + b.count)
    mean = a.mean + share * (b.mean - a.mean)
    # both about the common mean
    sides = (about((0.0, *s.moments[1:]), s.mean - mean) for s in (a, b))
    _, *central = (p + share * (q - p) for p, q in zip(*sides, strict=True))
    return mean, central[0], central[1], central[2]
