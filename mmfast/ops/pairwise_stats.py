"""Statistics of all inner products of two sets, or of one, without the matrix of them.

    s_ij = <x_i, y_j>      over all pairs, or over i < j of one set
    powers[p - 1] = sum (s_ij - pivot)^p for p = 1 to 4,    least and largest s_ij and their places,
    counts[b] = how many s_ij are in bin b: edges[b - 1] <= s_ij < edges[b], the last bin closed

in one visit of the products; of one set only half of them are made. The products are those of the
type (float32; float64 for float64), and everything said of them is exact or in float64 (sums of a
tile on a GPU apart, which are float32): counts are whole numbers, and sums about a pivot near the
mean lose nothing where the mean is large beside the spread. Statistics of blocks are therefore
those of the whole, to the last digits, however it is split.

Sources: the cosines of all pairs are those of Liang et al., Mind the Gap, NeurIPS 2022
(arXiv 2203.02053), Fig. 2; the published code holds the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_number,
    cast_as_matmul,
    check_alike,
    check_matrix,
    check_tensor,
    dense,
    type_name,
)
from mmfast.ops._statistics import PairwiseStats, about

MOST_BINS = 1 << 16
# rows of each side whose mean product is the pivot
SAMPLED = 256
Raw = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(x: Tensor, y: Tensor | None, edges: Tensor | None, pivot: Tensor) -> Raw:
    """The definition in plain torch: any device, [N, M] memory.

    Returns:
        counts [bins + 2] int64, below and above the edges first and last, or all in one [1];
        powers [4] float64; least and largest product [2] float64, inf and -inf of none; their
        places [2, 2] int64, -1 of none. A NaN is in none of them.
    """
    dtype = SCORE_TYPE[x.dtype]
    s = (x.to(dtype) @ (x if y is None else y).to(dtype).T).double()
    if y is None:
        below = torch.ones_like(s, dtype=torch.bool).tril()
        s = s.masked_fill(below, math.nan)
    kept = s[~s.isnan()]
    if edges is None:
        counts = kept.new_full((1,), kept.numel(), dtype=torch.int64)
    else:
        bins = torch.bucketize(kept, edges, right=True)
        counts = torch.bincount(bins - (kept == edges[-1]).long(), minlength=len(edges) + 1)
    powers = torch.stack([((kept - pivot) ** p).sum() for p in (1, 2, 3, 4)])
    extremes, places = [], []
    for sign in (1, -1):
        # the first of equal ones is the one with the lowest row, then column
        signed = (sign * s).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        best = (sign * s == signed.min()).reshape(-1)
        extremes.append(sign * signed.min())
        at = best.long().argmax()
        place = torch.stack([at // s.shape[1], at % s.shape[1]])
        places.append(torch.where(best.any(), place, -1))
    return counts, powers, torch.stack(extremes), torch.stack(places)


def _outputs(x: Tensor, edges: Tensor | None) -> Raw:
    slots = 1 if edges is None else len(edges) + 1
    return (
        x.new_empty(slots, dtype=torch.int64),
        x.new_empty(4, dtype=torch.float64),
        x.new_empty(2, dtype=torch.float64),
        x.new_empty((2, 2), dtype=torch.int64),
    )


def _cpp(x: Tensor, y: Tensor | None, edges: Tensor | None, pivot: Tensor) -> Raw:
    counts, powers, extremes, places = _outputs(x, edges)
    sums, least, largest = _dispatch.core.pairwise_stats(
        dense(x),
        None if y is None else dense(y),
        None if edges is None else edges.contiguous(),
        pivot.item(),
        counts,
        torch.get_num_threads(),
    )
    powers.copy_(torch.tensor(sums, dtype=torch.float64))
    for i, (value, *place) in enumerate((least, largest)):
        extremes[i] = value
        places[i] = torch.tensor(place)
    return counts, powers, extremes, places


def _triton(*inputs: Any) -> Any:
    return _dispatch.kernels("pairwise_stats").stats(*inputs)


def _fake(x: Tensor, y: Any, edges: Tensor | None, *others: Any) -> Raw:
    return _outputs(x, edges)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_stats = _dispatch.define(
    "pairwise_stats(Tensor x, Tensor? y, Tensor? edges, Tensor pivot, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    {"cpp": _cpp, "triton": _triton},
)


def pairwise_stats(
    x: Tensor,
    y: Tensor | None = None,
    *,
    bins: int | None = 256,
    range: tuple[float, float] = (-1.0, 1.0),
    row_offset: int = 0,
    column_offset: int = 0,
    backend: str | None = None,
) -> PairwiseStats:
    """Count, extremes, moments and histogram of all products `x @ y.T`, in O((N + M) * D) memory.

    Args:
        x: [N, D] float32, float64, bfloat16 or float16; any row stride, rows need not be unit.
        y: [M, D] of the same type and device. None: the pairs i < j of x, half the work.
        bins: of the histogram, up to 65,536; 0 or None for none, which is faster.
        range: what they divide, as in numpy.histogram: half open, the last one closed.
        row_offset, column_offset: added to the places of the extremes, where x and y are blocks of
            a larger set. The second is that of y, and x has one alone.
        backend: "cpp", "triton", "eager", or None for the first that can run.

    Returns:
        PairwiseStats on the CPU: a call waits for a GPU. Statistics of blocks merge by `+`. One
        set streams as blocks with themselves, `pairwise_stats(a)`, and with each later one,
        `pairwise_stats(a, b, ...)`.
        "cpp" and "eager" sum in float64; "triton" sums the products of a tile in float32.
        Products that are NaN are counted, and left out of all else; an infinite one is an extreme,
        outside of the range, and makes moments NaN or infinite.
        There is no gradient. Under autocast x and y are cast as a matmul would cast them.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of x and y.
        ValueError: a wrong shape, device or Python number, an empty side, bins too fine for the
            type of the products, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    check_tensor("pairwise_stats", "x", x)
    if y is not None:
        check_tensor("pairwise_stats", "y", y)
    x, other = cast_as_matmul(x.detach(), (x if y is None else y).detach())
    _check_sides(x, other)
    y = None if y is None else other
    _check_offsets(y, row_offset, column_offset)
    edges = _edges(x, bins, range)
    name = _dispatch.choose("pairwise_stats", backend, BACKENDS, x, other)
    pivot = _pivot(x, y)
    if name == "eager":
        # the cast is done: autocast must not touch the float32 product of the definition
        with torch.autocast(x.device.type, enabled=False):
            raw = reference(x, y, edges, pivot)
    else:
        raw = _stats(x, y, edges, pivot, name)
    offsets = (row_offset, row_offset if y is None else column_offset)
    N, M = len(x), len(other)
    return _stated(raw, edges, float(pivot), N * (N - 1) // 2 if y is None else N * M, offsets)


def _check_sides(x: Tensor, y: Tensor) -> None:
    for name, side in (("x", x), ("y", y)):
        check_matrix("pairwise_stats", name, side, "rows, D")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"pairwise_stats: y must have D={x.shape[1]} columns like x, got {y.shape[1]}"
        )
    check_alike("pairwise_stats", "y", y, "x", x)


def _check_offsets(y: Tensor | None, row_offset: int, column_offset: int) -> None:
    for name, offset in (("row_offset", row_offset), ("column_offset", column_offset)):
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise TypeError(f"pairwise_stats: {name} must be an int, got {type(offset).__name__}")
        if offset < 0:
            raise ValueError(f"pairwise_stats: {name} must not be negative, got {offset}")
    if y is None and column_offset:
        raise ValueError("pairwise_stats: column_offset needs y; row_offset is that of both sides")


def _edges(x: Tensor, bins: int | None, range: tuple[float, float]) -> Tensor | None:
    """numpy.linspace(*range, bins + 1), to the bit; on the device of `x`."""
    if bins is None:
        return None
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"pairwise_stats: bins must be an int or None, got {type(bins).__name__}")
    if not 0 <= bins <= MOST_BINS:
        raise ValueError(f"pairwise_stats: bins must be from 0 to {MOST_BINS}, got {bins}")
    if not isinstance(range, (tuple, list)) or len(range) != 2:
        raise TypeError(f"pairwise_stats: range must be two numbers, got {range!r}")
    low, high = (as_number("pairwise_stats", "range", end) for end in range)
    if not low < high:
        raise ValueError(f"pairwise_stats: range must increase, got ({low}, {high})")
    if bins == 0:
        return None
    width = (high - low) / bins
    dtype = SCORE_TYPE[x.dtype]
    info = torch.finfo(dtype)
    # kernels find a bin by one multiplication, which must not err by more than one
    if not max(info.tiny, 16 * info.eps * max(abs(low), abs(high))) <= width < math.inf:
        raise ValueError(
            f"pairwise_stats: bins of width {width:.3g} are too fine for {type_name(dtype)} "
            f"products from {low} to {high}"
        )
    edges = low + width * torch.arange(bins + 1, dtype=torch.float64)
    edges[-1] = high
    return edges.to(x.device)


def _pivot(x: Tensor, y: Tensor | None) -> Tensor:
    """The mean product of some rows of each side, as the type of the products has it: float64."""

    def some(side: Tensor) -> Tensor:
        rows = side[:: max(1, len(side) // SAMPLED)].double()
        return rows.nan_to_num(0.0, 0.0, 0.0)

    rows = some(x)
    if y is not None:
        mean = rows.mean(0) @ some(y).mean(0)
    else:
        N = len(rows)
        mean = (rows.sum(0).square().sum() - rows.square().sum()) / max(1, N * (N - 1))
    return mean.to(SCORE_TYPE[x.dtype]).nan_to_num(0.0, 0.0, 0.0).double()


def _stated(
    raw: Raw, edges: Tensor | None, pivot: float, pairs: int, offsets: tuple[int, int]
) -> PairwiseStats:
    counts, powers, extremes, places = (t.cpu() for t in raw)
    count = int(counts.sum())
    moments = (math.nan,) * 4
    if count:
        m1, m2, m3, m4 = (power / count for power in powers.tolist())
        _, *central = about((m1, m2, m3, m4), -m1)
        moments = (pivot + m1, central[0], central[1], central[2])
    least, largest = (
        (-1, -1) if row < 0 else (row + offsets[0], column + offsets[1])
        for row, column in places.tolist()
    )
    return PairwiseStats(
        count=count,
        nan=pairs - count,
        moments=moments,
        min=float(extremes[0]),
        max=float(extremes[1]),
        argmin=least,
        argmax=largest,
        histogram=None if edges is None else counts[1:-1].clone(),
        edges=None if edges is None else edges.cpu(),
        below=0 if edges is None else int(counts[0]),
        above=0 if edges is None else int(counts[-1]),
    )
