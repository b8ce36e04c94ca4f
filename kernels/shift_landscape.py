"""Log-sum-exps of shifted cosines, for many shifts and scales from one product of a tile.

A program visits a rectangle of one chunk's cosines, tile by tile, and takes every shift and scale
of the launch from the tile it has multiplied. (maximum, sum) of its rows and columns wait in global
memory, where each has one owner; the kernel of pairwise_lse merges what the programs found.

    bfloat16, float16, float32 in -> float32 products (tf32 where torch's own may use it), cosines,
                                     maxima and sums
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _tiles as tiles
from mmfast.kernels._pairwise_lse_forward import combine_kernel, visit
from mmfast.kernels._tile import INF, LOG2E, Tile, dense, float32, guard, products

# what a launch may keep of maxima and sums, at least those of one shift
WORKSPACE_BYTES = 1 << 28
# shifts of a launch: the product is made anew for every so many, and takes a sixth of their time
SHIFTS = 2 if tiles.INTERPRETED else 8


@triton.jit
def landscape_kernel(
    X, X_INVERSE, X_OFFSETS, X_FACTORS, Y, Y_INVERSE, Y_OFFSETS, Y_FACTORS, SCALES,
    ROW_MAX, ROW_SUM, COLUMN_MAX, COLUMN_SUM,
    N, chunk, shifts, scales, stride_x, stride_y, blocks_per_group, tiles_per_split,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_group, i_split, i_chunk) owns some row blocks and a range of columns of a chunk.

    *_OFFSETS, *_FACTORS: [shifts, N]. SCALES: [scales]. ROW_*: [splits, shifts, scales, N] and
    COLUMN_*: [groups, shifts, scales, N], which hold empty pairs (-inf, 0) at first.
    """
    i_group, i_split = tl.program_id(0), tl.program_id(1)
    begin = tl.program_id(2) * chunk
    size = tl.minimum(chunk, N - begin)
    start = i_split * tiles_per_split * BLOCK_M
    end = tl.minimum(start + tiles_per_split * BLOCK_M, size)
    first = i_group * blocks_per_group
    last = tl.minimum(first + blocks_per_group, tl.cdiv(size, BLOCK_N))
    p_rows = i_split.to(tl.int64) * shifts * scales * N
    p_columns = i_group.to(tl.int64) * shifts * scales * N
    for i_block in range(first, last):
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < size
        o_x = begin + tl.minimum(o_n, size - 1)
        b_x_inverse = tl.load(X_INVERSE + o_x)
        for i_m in range(start, end, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            m_m = o_m < size
            o_y = begin + tl.minimum(o_m, size - 1)
            b_s = products(X, Y, o_x, o_y, stride_x, stride_y, D, BLOCK_D, PRECISION)
            b_s = b_s * b_x_inverse[:, None] * tl.load(Y_INVERSE + o_y)[None, :]
            m_s = m_n[:, None] & m_m[None, :] & (o_n[:, None] != o_m[None, :])
            b_s = tl.where(m_s, b_s, -INF)
            for i_l in range(shifts):
                o_l = tl.cast(i_l, tl.int64) * N
                b_z = b_s + tl.load(X_OFFSETS + o_l + o_x)[:, None]
                b_z = (b_z + tl.load(Y_OFFSETS + o_l + o_y)[None, :]) * LOG2E
                b_z = b_z * tl.load(X_FACTORS + o_l + o_x)[:, None]
                b_z = b_z * tl.load(Y_FACTORS + o_l + o_y)[None, :]
                for i_t in range(scales):
                    o_lt = (tl.cast(i_l, tl.int64) * scales + i_t) * N
                    p_row = p_rows + o_lt + o_x
                    p_column = p_columns + o_lt + o_y
                    b_max, b_sum = visit(
                        b_z * tl.load(SCALES + i_t),
                        tl.load(ROW_MAX + p_row, mask=m_n, other=-INF),
                        tl.load(ROW_SUM + p_row, mask=m_n, other=0.0),
                        COLUMN_MAX + p_column, COLUMN_SUM + p_column, m_m, 1, True,
                    )  # fmt: skip
                    tl.store(ROW_MAX + p_row, b_max, mask=m_n)
                    tl.store(ROW_SUM + p_row, b_sum, mask=m_n)
            # the next tile reads what other threads of this program have stored
            tl.debug_barrier()


def _tile(n: int, m: int, d: int, warps: int, stages: int) -> tuple[tuple[int, Tile], ...]:
    return ((tiles.ANY, Tile(n, m, d, 1, warps, stages, tiles.COMPILED)),)


TILES = {
    ("landscape", "half", 80): _tile(64, 64, 64, 8, 3),
    ("landscape", "half", 90): _tile(64, 64, 64, 8, 3),
    ("landscape", "half", 100): _tile(64, 32, 64, 8, 3),
    ("landscape", "tf32", 80): _tile(64, 64, 32, 8, 3),
    ("landscape", "tf32", 90): _tile(64, 64, 32, 8, 3),
    ("landscape", "tf32", 100): _tile(64, 32, 32, 8, 3),
    ("landscape", "ieee", 80): _tile(64, 64, 32, 8, 3),
    ("landscape", "ieee", 90): _tile(64, 64, 32, 8, 3),
    ("landscape", "ieee", 100): _tile(64, 64, 32, 8, 3),
}


def constants(D: int, kind: str, tile: Tile) -> dict[str, int | str]:
    """What a launch is compiled for, beside the types of its arguments."""
    made = tiles.constants("landscape", D, kind, tile)
    del made["HALVES"]
    return made


def log_sums(
    x: Tensor, x_inverse: Tensor, x_offsets: Tensor, x_factors: Tensor,
    y: Tensor, y_inverse: Tensor, y_offsets: Tensor, y_factors: Tensor,
    scales: list[float], chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-sum-exps of rows and columns without own pairs, each float32 [L, T, N].

    Args:
        x, y: [N, D], both float32, bfloat16 or float16.
        x_inverse, y_inverse: float32 [N]. *_offsets, *_factors: float32 [L, N].
        scales: T numbers. chunk: rows that meet each other, at most N.
    """
    x, y = dense(x), dense(y)
    (N, D), L, T = x.shape, len(x_offsets), len(scales)
    tile = tiles.pick("landscape", x, chunk, chunk, table=TILES)
    row_blocks, column_tiles = triton.cdiv(chunk, tile.n), triton.cdiv(chunk, tile.m)
    blocks_per_group, tiles_per_split = tiles.shares(row_blocks, column_tiles, True)
    groups = triton.cdiv(row_blocks, blocks_per_group)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    # a copy of the numbers from the host's memory would end the capture of a CUDA graph
    scale = torch.stack([torch.full((), z, dtype=x_inverse.dtype, device=x.device) for z in scales])
    rows, columns = float32(x, L, T, N), float32(x, L, T, N)
    some = max(1, min(SHIFTS, WORKSPACE_BYTES // (8 * (groups + splits) * T * N)))
    with guard(x):
        for first in range(0, L, some):
            shifts = slice(first, first + some)
            count = len(x_offsets[shifts])
            parts = [_empty_sums(x, parts, count, T, N) for parts in (splits, groups)]
            landscape_kernel[(groups, splits, triton.cdiv(N, chunk))](
                x, x_inverse, x_offsets[shifts], x_factors[shifts],
                y, y_inverse, y_offsets[shifts], y_factors[shifts],
                scale, *parts[0], *parts[1],
                N, chunk, count, T, x.stride(0), y.stride(0), blocks_per_group, tiles_per_split,
                **constants(D, tiles.kind_of(x.dtype), tile),
            )  # fmt: skip
            for (most, total), out in zip(parts, (rows[shifts], columns[shifts]), strict=True):
                combine_kernel[(triton.cdiv(out.numel(), tiles.COMBINE),)](
                    most, total, out, out.numel(), len(most), BLOCK=tiles.COMBINE
                )
    return rows, columns


def _empty_sums(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Maxima and sums of nothing."""
    most = torch.full(shape, -math.inf, dtype=torch.float32, device=like.device)
    return most, torch.zeros_like(most)
