"""Kernels of pairwise_lse, forward: (maximum, sum) of rows and columns, and their merge.

A program visits a rectangle of the scores, tile by tile, and keeps (maximum, sum) of each of its
rows and columns; a second kernel merges what the programs found. The scores are never stored.
Exponentials are powers of two of scores times log2(e), which is one instruction.

    bfloat16, float16 in -> float32 products, maxima, sums and results
    float32 in           -> the same, products in tf32 where torch's own may use it
"""

import triton
import triton.language as tl

from mmfast.kernels._tile import INF, LN2, LOG2E, fill_left_out, halves, products


@triton.jit
def shift_of(b_max):
    # 0 in place of an infinite maximum: inf - inf is NaN, and exp2 is right without a shift
    return tl.where(tl.abs(b_max) == INF, 0.0, b_max)


@triton.jit
def merge(b_max, b_sum, b_max_2, b_sum_2):
    """(maximum, sum) of two parts; an empty part is (-inf, 0)."""
    b_most = tl.maximum(b_max, b_max_2)
    b_shift = shift_of(b_most)
    return b_most, b_sum * tl.exp2(b_max - b_shift) + b_sum_2 * tl.exp2(b_max_2 - b_shift)


@triton.jit
def visit(b_s, b_max, b_sum, p_column_max, p_column_sum, m_m, i_block, COLUMNS: tl.constexpr):
    """Take a tile of scores into the running pair of its rows and into the stored one of its
    columns."""
    b_most = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = shift_of(b_most)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
    if COLUMNS:
        b_column_max = tl.max(b_s, 0)
        b_column_sum = tl.sum(tl.exp2(b_s - shift_of(b_column_max)[None, :]), 0)
        if i_block > 0:
            b_column_max, b_column_sum = merge(
                tl.load(p_column_max, mask=m_m, other=-INF),
                tl.load(p_column_sum, mask=m_m, other=0.0),
                b_column_max,
                b_column_sum,
            )
        tl.store(p_column_max, b_column_max, mask=m_m)
        tl.store(p_column_sum, b_column_sum, mask=m_m)
    return b_most, b_sum


@triton.jit
def forward_kernel(
    Q, K, SCALE, Q_IDS, K_IDS, MASK, ROW_MAX, ROW_SUM, COLUMN_MAX, COLUMN_SUM,
    N, M, stride_q, stride_k, stride_mask_n, stride_mask_m, blocks_per_group, tiles_per_split,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_group, i_split) owns some row blocks and a range of columns.

    ROW_*: [splits, N], written once. COLUMN_*: [groups, M], or None: each entry has one owner,
    which merges its row blocks into it one after another.
    """
    i_group, i_split = tl.program_id(0), tl.program_id(1)
    scale2 = tl.load(SCALE) * LOG2E
    start = i_split * tiles_per_split * BLOCK_M
    end = tl.minimum(start + tiles_per_split * BLOCK_M, M)
    first = i_group * blocks_per_group
    blocks = tl.minimum(blocks_per_group, tl.cdiv(N, BLOCK_N) - first)
    COLUMNS: tl.constexpr = COLUMN_MAX is not None
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    for i_block in range(blocks):
        o_n = (first + i_block) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_q = tl.minimum(o_n, N - 1)
        b_max = tl.full([BLOCK_N], -INF, tl.float32)
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        for i_m in range(start, end, BLOCK_M):
            o_k = tl.minimum(i_m + tl.arange(0, BLOCK_M), M - 1)
            b_s = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION) * scale2
            b_parts = (b_s,) if HALVES == 1 else halves(b_s)
            for i_half in tl.static_range(HALVES):
                o_m = i_m + i_half * WIDTH + tl.arange(0, WIDTH)
                b_part = fill_left_out(
                    b_parts[i_half], -INF, o_n, o_m, N, M, Q_IDS, K_IDS, MASK,
                    stride_mask_n, stride_mask_m,
                )  # fmt: skip
                p_column_max, p_column_sum = o_m, o_m
                if COLUMNS:
                    p_column_max = COLUMN_MAX + i_group.to(tl.int64) * M + o_m
                    p_column_sum = COLUMN_SUM + i_group.to(tl.int64) * M + o_m
                b_max, b_sum = visit(
                    b_part, b_max, b_sum, p_column_max, p_column_sum, o_m < M, i_block, COLUMNS
                )
        o_row = i_split.to(tl.int64) * N + o_n
        tl.store(ROW_MAX + o_row, b_max, mask=o_n < N)
        tl.store(ROW_SUM + o_row, b_sum, mask=o_n < N)
        # the next row block reads what other threads of this program have stored
        tl.debug_barrier()


@triton.jit
def combine_kernel(MAX, SUM, OUT, N, parts, BLOCK: tl.constexpr):
    """OUT[i] = log of the sum that MAX and SUM [parts, N] hold in parts, merged in their order."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_max = tl.full([BLOCK], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    p_max, p_sum = MAX + o_n, SUM + o_n
    for _ in range(parts):
        b_part_max = tl.load(p_max, mask=m_n, other=-INF)
        b_part_sum = tl.load(p_sum, mask=m_n, other=0.0)
        b_max, b_sum = merge(b_max, b_sum, b_part_max, b_part_sum)
        p_max += N
        p_sum += N
    tl.store(OUT + o_n, (b_max + tl.log2(b_sum)) * LN2, mask=m_n)
