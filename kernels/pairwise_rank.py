"""The largest score of every row and how many exceed a threshold: a Triton kernel.

A program visits some columns of a block of rows, tile by tile, and keeps of each row the largest
score, where it stands and the count; torch takes the best of the programs, and adds.

    bfloat16, float16, float32 in -> float32 products (tf32 where torch's own may use it) -> int64
    columns and counts
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _tiles as tiles
from mmfast.kernels._tile import INF, dense, fill_left_out, float32, guard, halves, products


@triton.jit
def rank_kernel(
    Q, K, THRESHOLD, Q_IDS, K_IDS, BEST, INDEX, ABOVE,
    N, M, stride_q, stride_k, tiles_per_split,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_n, i_split) ranks a block of rows against a range of columns.

    BEST, INDEX, ABOVE: [splits, N]; -inf and -1 for none. THRESHOLD [N] or None, then no ABOVE.
    """
    i_n, i_split = tl.program_id(0), tl.program_id(1)
    start = i_split * tiles_per_split * BLOCK_M
    end = tl.minimum(start + tiles_per_split * BLOCK_M, M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.minimum(o_n, N - 1)
    o_tile = tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    b_best = tl.full([BLOCK_N], -INF, tl.float32)
    b_index = tl.full([BLOCK_N], -1, tl.int32)
    b_above = tl.zeros([BLOCK_N], tl.int32)
    if THRESHOLD is not None:
        b_threshold = tl.load(THRESHOLD + o_q)
    for i_m in range(start, end, BLOCK_M):
        o_k = tl.minimum(i_m + o_tile, M - 1)
        b_s = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION)
        b_parts = (b_s,) if HALVES == 1 else halves(b_s)
        for i_half in tl.static_range(HALVES):
            o_m = i_m + i_half * WIDTH + tl.arange(0, WIDTH)
            # nothing exceeds a threshold by -inf, and it is never the largest
            b_x = fill_left_out(b_parts[i_half], -INF, o_n, o_m, N, M, Q_IDS, K_IDS, None, 0, 0)
            b_x = tl.where(b_x == b_x, b_x, -INF)
            b_most = tl.max(b_x, 1)
            b_at = tl.min(tl.where(b_x == b_most[:, None], o_m[None, :], M), 1)
            # columns come in order: the first of equal ones stays
            m_better = b_most > b_best
            b_best = tl.where(m_better, b_most, b_best)
            b_index = tl.where(m_better, b_at, b_index)
            if THRESHOLD is not None:
                b_above += tl.sum((b_x > b_threshold[:, None]).to(tl.int32), 1)
    o_row = i_split.to(tl.int64) * N + o_n
    tl.store(BEST + o_row, b_best, mask=o_n < N)
    tl.store(INDEX + o_row, b_index, mask=o_n < N)
    if THRESHOLD is not None:
        tl.store(ABOVE + o_row, b_above, mask=o_n < N)


def rank(
    q: Tensor,
    k: Tensor,
    threshold: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(largest [N] float32, index [N] int64, above [N] int64).

    Args:
        q, k: [N, D] and [M, D], both float32, bfloat16 or float16; no empty side.
        threshold: float32 [N].
        q_ids, k_ids: int64 [N] and [M]; a pair with equal ids is left out.
    """
    q, k = dense(q), dense(k)
    threshold, q_ids, k_ids = (
        None if x is None else x.contiguous() for x in (threshold, q_ids, k_ids)
    )
    (N, D), M = q.shape, k.shape[0]
    tile = tiles.pick("rank", q, N, M)
    row_blocks, column_tiles = triton.cdiv(N, tile.n), triton.cdiv(M, tile.m)
    _, tiles_per_split = tiles.shares(row_blocks, column_tiles, False)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    best = float32(q, splits, N)
    index = torch.empty((splits, N), dtype=torch.int64, device=q.device)
    above = None if threshold is None else torch.empty_like(index)
    with guard(q):
        rank_kernel[(row_blocks, splits)](
            q, k, threshold, q_ids, k_ids, best, index, above,
            N, M, q.stride(0), k.stride(0), tiles_per_split,
            **tiles.constants("rank", D, tiles.kind_of(q.dtype), tile),
        )  # fmt: skip
    # the first of equal ones, which has the lowest columns
    largest, split = best.max(0)
    index = index.gather(0, split[None]).squeeze(0)
    return largest, index, torch.zeros_like(index) if above is None else above.sum(0)
