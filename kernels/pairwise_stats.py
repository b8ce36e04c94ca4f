"""Statistics of all products of two sets, or of one: a Triton kernel.

A program makes one tile of products; of one set, those below the diagonal end at once. It leaves
sums and extremes of the tile, which torch puts together, and adds its counts of a histogram to one
of a few copies of it: whole numbers, so that their order does not matter.

    bfloat16, float16, float32 in -> float32 products (tf32 where torch's own may use it), float32
    sums of a tile, float64 sums of tiles; exact counts
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from mmfast.kernels import _tiles as tiles
from mmfast.kernels._tile import (
    INF,
    Tile,
    dense,
    fill_left_out,
    guard,
    halves,
    on_device,
    products,
    start_of,
)

NAN = tl.constexpr(float("nan"))
# of the histogram: programs that run at a time seldom meet in one
COPIES = 64
# what a program has of it in registers at once: wider ones take several passes over a tile
WIDEST = 1024
_NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def slots_of(b_x, EDGES, RANGE, bins):
    """Where products are to be counted: 0 below the edges, b in bin b, bins + 1 above.

    EDGES: float32 [bins + 1], the least numbers of that type that are not below the true edges.
    RANGE: float32 [3], the first edge, bins by unit, and the last edge or, where no float32 is
    equal to it, NaN.
    """
    b_guess = (b_x - tl.load(RANGE)) * tl.load(RANGE + 1)
    # of what is no product, too, the guess must be a place in EDGES
    b_guess = tl.minimum(tl.maximum(tl.where(b_x == b_x, b_guess, 0.0), 0.0), bins - 1.0)
    b_slot = b_guess.to(tl.int32) + 1
    # one multiplication errs by less than a bin; the edges themselves have the last word
    b_slot += (b_x >= tl.load(EDGES + b_slot)).to(tl.int32)
    b_slot -= (b_x < tl.load(EDGES + b_slot - 1)).to(tl.int32)
    # the last bin is closed
    return b_slot - (b_x == tl.load(RANGE + 2)).to(tl.int32)


@triton.jit
def stats_kernel(
    X, Y, PIVOT, EDGES, RANGE, COUNTS, SUMS, EXTREMES, PLACES,
    N, M, stride_x, stride_y, stride_sums, bins, copies,
    DISTINCT: tl.constexpr, SLOTS: tl.constexpr, PASSES: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of products, and its column of SUMS [4, tiles], EXTREMES and PLACES [2, tiles].

    SUMS: of powers of what is above the pivot. PLACES: row * M + column of the first one; what a
    program writes nothing to is as the launch filled it. COUNTS: int64 [copies, SLOTS * PASSES], by
    `slots_of`; without EDGES all of them in slot 0.
    """
    i_tile = tl.program_id(0)
    start_n, start_m = start_of(i_tile, N, M, BLOCK_N, BLOCK_M)
    if DISTINCT:  # noqa: SIM102 (decided when it compiles, what is inside when it runs)
        if start_m + BLOCK_M - 1 <= start_n:
            return
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_x = tl.minimum(o_n, N - 1)
    o_y = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1)
    b_s = products(X, Y, o_x, o_y, stride_x, stride_y, D, BLOCK_D, PRECISION)
    pivot = tl.load(PIVOT)
    b_parts = (b_s,) if HALVES == 1 else halves(b_s)
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    sum1, sum2, sum3, sum4 = 0.0, 0.0, 0.0, 0.0
    least, largest = INF, -INF
    least_at, largest_at = _NOWHERE, _NOWHERE
    p_counts = COUNTS + (i_tile % copies).to(tl.int64) * SLOTS * PASSES
    for i_half in tl.static_range(HALVES):
        o_c = i_half * WIDTH + tl.arange(0, WIDTH)
        b_x = fill_left_out(b_parts[i_half], NAN, o_n, start_m + o_c, N, M, None, None, None, 0, 0)
        if DISTINCT:
            b_x = tl.where(o_n[:, None] < start_m + o_c[None, :], b_x, NAN)
        m_x = b_x == b_x
        b_d = tl.where(m_x, b_x - pivot, 0.0)
        b_square = b_d * b_d
        sum1 += tl.sum(b_d)
        sum2 += tl.sum(b_square)
        sum3 += tl.sum(b_square * b_d)
        sum4 += tl.sum(b_square * b_square)
        b_at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + o_c[None, :]
        # the lowest place, also of equal ones in both halves
        x = tl.min(tl.where(m_x, b_x, INF))
        at = tl.min(tl.where(b_x == x, b_at, _NOWHERE))
        least_at = tl.where(x < least, at, tl.where(x == least, tl.minimum(at, least_at), least_at))
        least = tl.minimum(x, least)
        x = tl.max(tl.where(m_x, b_x, -INF))
        at = tl.min(tl.where(b_x == x, b_at, _NOWHERE))
        largest_at = tl.where(
            x > largest, at, tl.where(x == largest, tl.minimum(at, largest_at), largest_at)
        )
        largest = tl.maximum(x, largest)
        if EDGES is None:
            tl.atomic_add(p_counts, tl.sum(m_x.to(tl.int32)).to(tl.int64))
        else:
            b_slot = tl.reshape(slots_of(b_x, EDGES, RANGE, bins), (BLOCK_N * WIDTH,))
            m_slot = tl.reshape(m_x, (BLOCK_N * WIDTH,))
            for i_pass in tl.static_range(PASSES):
                b_here = b_slot - i_pass * SLOTS
                m_here = m_slot & (b_here >= 0) & (b_here < SLOTS)
                b_here = tl.where(m_here, b_here, 0)
                b_counts = tl.histogram(b_here, SLOTS, mask=m_here)
                p_slots = p_counts + i_pass * SLOTS + tl.arange(0, SLOTS)
                tl.atomic_add(p_slots, b_counts.to(tl.int64), mask=b_counts > 0)
    tl.store(SUMS + i_tile, sum1)
    tl.store(SUMS + stride_sums + i_tile, sum2)
    tl.store(SUMS + 2 * stride_sums + i_tile, sum3)
    tl.store(SUMS + 3 * stride_sums + i_tile, sum4)
    if least_at != _NOWHERE:
        first = start_n.to(tl.int64) * M + start_m
        tl.store(EXTREMES + i_tile, least)
        tl.store(PLACES + i_tile, first + least_at // BLOCK_M * M + least_at % BLOCK_M)
        tl.store(EXTREMES + stride_sums + i_tile, largest)
        tl.store(
            PLACES + stride_sums + i_tile, first + largest_at // BLOCK_M * M + largest_at % BLOCK_M
        )


def passes(bins: int) -> tuple[int, int]:
    """Slots of the histogram that a program counts at a time, and how often it does."""
    slots = min(next_power_of_2(bins + 2), WIDEST)
    return slots, triton.cdiv(bins + 2, slots)


def stats(
    x: Tensor, y: Tensor | None, edges: Tensor | None, pivot: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts, powers, extremes, places), as `mmfast.ops.pairwise_stats.reference` has them.

    Args:
        x, y: [N, D] and [M, D], both float32, bfloat16 or float16; no empty side; y None: the
            pairs i < j of x.
        edges: float64 [bins + 1], increasing, bins no finer than float32 tells apart; or None.
        pivot: 0-dim, a number of float32.
    """
    x, other = dense(x), dense(x if y is None else y)
    (N, D), M = x.shape, other.shape[0]
    tile = tiles.pick("stats", x, N, M)
    programs = triton.cdiv(N, tile.n) * triton.cdiv(M, tile.m)
    copies = min(COPIES, programs)
    slots, rounds = (1, 1) if edges is None else passes(len(edges) - 1)
    counts = x.new_zeros((copies, slots * rounds), dtype=torch.int64)
    sums = x.new_zeros((4, programs), dtype=torch.float32)
    extremes = x.new_zeros((2, programs), dtype=torch.float32)
    extremes[0], extremes[1] = torch.inf, -torch.inf
    places = x.new_full((2, programs), N * M, dtype=torch.int64)
    above, span, bins = None, None, 0
    if edges is not None:
        above, bins = not_below(edges), len(edges) - 1
        low, high = edges[0], edges[-1]
        closed = torch.where(high.float() == high, high, torch.nan)
        span = torch.stack([low, bins / (high - low), closed]).float()
    with guard(x):
        stats_kernel[(programs,)](
            x, other, on_device(pivot, x.device), above, span, counts, sums, extremes, places,
            N, M, x.stride(0), other.stride(0), sums.stride(0),
            bins, copies,
            **constants(D, tiles.kind_of(x.dtype), tile, y is None, slots, rounds),
        )  # fmt: skip
    total = counts.sum(0)
    best = torch.stack([extremes[0].amin(), extremes[1].amax()])
    place = places.masked_fill(extremes != best[:, None], N * M).amin(1)
    where = torch.stack([place // M, place % M], 1)
    where = where.masked_fill((place == N * M)[:, None], -1)
    size = 1 if edges is None else len(edges) + 1
    return total[:size].clone(), sums.sum(1, dtype=torch.float64), best.double(), where


def not_below(edges: Tensor) -> Tensor:
    """The least float32 numbers that are not below float64 `edges`."""
    near = edges.float()
    return torch.where(
        near.double() < edges, torch.nextafter(near, near.new_tensor(torch.inf)), near
    )


def constants(
    D: int, kind: str, tile: Tile, distinct: bool, slots: int, rounds: int
) -> dict[str, int | str]:
    """What a launch is compiled for, beside the types of its arguments."""
    made = tiles.constants("stats", D, kind, tile)
    return {**made, "DISTINCT": distinct, "SLOTS": slots, "PASSES": rounds}
