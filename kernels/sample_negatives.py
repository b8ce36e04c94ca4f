"""One draw per row from the softmax of scaled similarities: a Triton kernel.

A program visits some columns of a block of rows, tile by tile, and keeps the best score + noise of
each row and where it stands; torch takes the best of the programs. The words of a Philox counter
belong to four neighbouring columns: a tile is loaded with its columns in the order 0, 4, 8, ...,
1, 5, 9, ..., so that each word meets a quarter of the tile and none changes its place.

    bfloat16, float16, float32 in -> float32 products (tf32 where torch's own may use it), noise and
    sums -> int64 columns
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
)


@triton.jit
def gumbel(b_word):
    """-log(-log(1 - v)), v the word as a number in (0, 1)."""
    b_v = (b_word.to(tl.float32) + 0.5) * (1 / 4294967296.0)
    # 1 - v from the word itself: near 0 the difference has nothing left
    b_rest = ((b_word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1 / 4294967296.0)
    # the logarithm of a card is exact near 1 by its size only: small v take its series
    b_series = 1 / 7.0 + b_v * (1 / 8.0)
    b_series = 1 / 6.0 + b_v * b_series
    b_series = 1 / 5.0 + b_v * b_series
    b_series = 1 / 4.0 + b_v * b_series
    b_series = 1 / 3.0 + b_v * b_series
    b_series = 1 / 2.0 + b_v * b_series
    b_series = b_v + b_v * b_v * b_series
    return -tl.log(tl.where(b_v < 0.125, b_series, -tl.log(b_rest)))


@triton.jit
def sample_kernel(
    Q, K, SCALE, SEED, Q_IDS, K_IDS, BEST, INDEX,
    N, M, stride_q, stride_k, tiles_per_split,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_n, i_split) draws for a block of rows from a range of columns.

    BEST, INDEX: [splits, N], the best score + noise of a row and its column; -inf and -1 for none.
    """
    i_n, i_split = tl.program_id(0), tl.program_id(1)
    scale, seed = tl.load(SCALE), tl.load(SEED)
    start = i_split * tiles_per_split * BLOCK_M
    end = tl.minimum(start + tiles_per_split * BLOCK_M, M)
    QUADS: tl.constexpr = BLOCK_M // 4
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.minimum(o_n, N - 1)
    o_tile = tl.arange(0, BLOCK_M)
    o_tile = o_tile % QUADS * 4 + o_tile // QUADS
    o_quad = tl.arange(0, QUADS)
    b_best = tl.full([BLOCK_N], -INF, tl.float32)
    b_index = tl.full([BLOCK_N], -1, tl.int32)
    for i_m in range(start, end, BLOCK_M):
        o_k = tl.minimum(i_m + o_tile, M - 1)
        b_s = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION) * scale
        b_left, b_right = halves(b_s)
        b_0, b_1 = halves(b_left)
        b_2, b_3 = halves(b_right)
        b_quarters = (b_0, b_1, b_2, b_3)
        b_words = tl.philox(seed, (i_m // 4 + o_quad)[None, :], o_n[:, None], 0, 0)
        for i_word in tl.static_range(4):
            o_m = i_m + o_quad * 4 + i_word
            b_x = b_quarters[i_word] + gumbel(b_words[i_word])
            b_x = fill_left_out(b_x, -INF, o_n, o_m, N, M, Q_IDS, K_IDS, None, 0, 0)
            b_x = tl.where(b_x == b_x, b_x, -INF)
            b_most = tl.max(b_x, 1)
            b_at = tl.min(tl.where(b_x == b_most[:, None], o_m[None, :], M), 1)
            # equal ones: the lowest column, of whichever quarter
            m_better = (b_most > b_best) | ((b_most == b_best) & (b_at < b_index))
            b_best = tl.where(m_better, b_most, b_best)
            b_index = tl.where(m_better, b_at, b_index)
    o_row = i_split.to(tl.int64) * N + o_n
    tl.store(BEST + o_row, b_best, mask=o_n < N)
    tl.store(INDEX + o_row, b_index, mask=o_n < N)


def _tile(n: int, m: int, d: int, warps: int, stages: int) -> tuple[tuple[int, Tile], ...]:
    return ((tiles.ANY, Tile(n, m, d, 4, warps, stages, tiles.COMPILED)),)


# those of pairwise_lse, narrower where the noise takes too many registers
TILES = {
    ("sample", "half", 80): _tile(128, 64, 64, 8, 3),
    ("sample", "half", 90): _tile(128, 128, 64, 8, 3),
    ("sample", "half", 100): _tile(128, 64, 64, 8, 3),
    ("sample", "tf32", 80): _tile(128, 64, 32, 8, 3),
    ("sample", "tf32", 90): _tile(128, 64, 32, 8, 3),
    ("sample", "tf32", 100): _tile(128, 64, 32, 8, 3),
    ("sample", "ieee", 80): _tile(64, 64, 32, 4, 3),
    ("sample", "ieee", 90): _tile(64, 64, 32, 4, 3),
    ("sample", "ieee", 100): _tile(64, 32, 32, 4, 3),
}


def constants(D: int, kind: str, tile: Tile) -> dict[str, int | str]:
    """What a launch is compiled for, beside the types of its arguments."""
    made = tiles.constants("sample", D, kind, tile)
    del made["HALVES"]
    return made


def sample(
    q: Tensor, k: Tensor, scale: Tensor, seed: Tensor, q_ids: Tensor, k_ids: Tensor
) -> Tensor:
    """The columns drawn, int64 [N].

    Args:
        q, k: [N, D] and [M, D], both float32, bfloat16 or float16; no empty side.
        scale, seed: 0-dim, on the device of q, where the kernel reads them, or on the CPU.
        q_ids, k_ids: int64 [N] and [M]; a pair with equal ids is left out.
    """
    q, k = dense(q), dense(k)
    (N, D), M = q.shape, k.shape[0]
    tile = tiles.pick("sample", q, N, M, table=TILES)
    row_blocks, column_tiles = triton.cdiv(N, tile.n), triton.cdiv(M, tile.m)
    _, tiles_per_split = tiles.shares(row_blocks, column_tiles, False)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    best = torch.empty((splits, N), dtype=torch.float32, device=q.device)
    index = torch.empty((splits, N), dtype=torch.int64, device=q.device)
    with guard(q):
        sample_kernel[(row_blocks, splits)](
            q, k, on_device(scale, q.device), on_device(seed, q.device, torch.int64),
            q_ids.contiguous(), k_ids.contiguous(), best, index,
            N, M, q.stride(0), k.stride(0), tiles_per_split,
            **constants(D, tiles.kind_of(q.dtype), tile),
        )  # fmt: skip
    # the first of equal ones, which has the lowest columns
    return index.gather(0, best.argmax(0, keepdim=True)).squeeze(0)
