"""The best token of every sample and code, and what its gradient becomes: three Triton kernels.

    pool_kernel      tiles of scores, reduced to the best of each sample that reaches into them
    tokens_kernel    per sample a product of codes with a matrix that says who won; blocks of codes
                     that all have slope 0 are skipped
    codebook_kernel  per code a sum over samples, in their order, of rows that are gathered

    bfloat16, float16 in -> float32 products and sums; slopes rounded to the inputs' type, each
                            sample's in units of its largest, for the product of tokens_kernel
    float32 in           -> float32 throughout, products in tf32 where torch's own may use it

No atomic addition: every sum has one owner and one order. Nothing here waits for a card.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _tiles as tiles
from mmfast.kernels._tile import (
    INF,
    INTERPRETED,
    Tile,
    dense,
    dot,
    float32,
    guard,
    on_device,
    products,
    to_type,
)

# codes that are widened to float32 at once for a library's product
PART = 4096
# programs of pool_kernel: about one wave of a large card, so that few tiles are ragged
PROGRAMS = 6 if INTERPRETED else 256


@triton.jit
def pool_kernel(
    Q, K, SCALE, MASK, OTHER, BEST, WINNERS,
    samples, N, M, stride_q, stride_k, samples_per_split,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_m, i_split) finds the best of a block of codes in a range of samples.

    Q: [samples * N, D]. MASK: uint8 [samples * N], 0 leaves out, or None. OTHER: [samples], a
    score that is met beside those of the tokens. BEST, WINNERS: [samples, M].
    """
    i_m, i_split = tl.program_id(0), tl.program_id(1)
    scale = tl.load(SCALE)
    start = i_split * samples_per_split * N
    end = tl.minimum(start + samples_per_split * N, samples * N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.minimum(o_m, M - 1)
    b_best = tl.full([BLOCK_M], -INF, tl.float32)
    b_winner = tl.full([BLOCK_M], -1, tl.int32)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_q = tl.minimum(o_n, end - 1)
        b_s = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION)
        m_n = o_n < end
        if MASK is not None:
            m_n = m_n & (tl.load(MASK + o_q) != 0)
        for i_sample in range(i_n // N, (tl.minimum(i_n + BLOCK_N, end) - 1) // N + 1):
            m_own = (m_n & (o_n // N == i_sample))[:, None]
            m_number = m_own & (b_s == b_s)
            b_x = tl.where(m_number, b_s, -INF)
            b_most = tl.max(b_x, 0)
            m_most = m_number & (b_x == b_most[None, :])
            b_place = tl.min(tl.where(m_most, o_n[:, None], samples * N), 0) - i_sample * N
            b_lost = tl.max(tl.where(m_own & (b_s != b_s), 1, 0), 0)
            # a sample that began in an earlier tile goes on; NaN stays
            fresh = i_sample * N >= i_n
            b_best = tl.where(fresh, -INF, b_best)
            b_winner = tl.where(fresh, -1, b_winner)
            m_better = b_most > b_best
            b_winner = tl.where(m_better, b_place, b_winner)
            b_best = tl.where(m_better, b_most, b_best)
            b_best = tl.where(b_lost > 0, float("nan"), b_best)
            b_z = b_best * scale
            other = tl.load(OTHER + i_sample)
            m_other = b_z < other
            o_out = tl.cast(i_sample, tl.int64) * M + o_m
            tl.store(BEST + o_out, tl.where(m_other, other, b_z), mask=o_m < M)
            tl.store(WINNERS + o_out, tl.where(m_other, -1, b_winner), mask=o_m < M)


@triton.jit
def tokens_kernel(
    K, SLOPES, UNITS, WINNERS, DX,
    N, M, stride_k,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_d, i_n, i_sample) sums slope * code over what some tokens of a sample won.

    SLOPES: [samples, M] in units of UNITS: [samples]. DX: [samples * N, D].
    """
    i_d, i_n, i_sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = i_sample.to(tl.int64) * M
    for i_m in range(0, M, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_slope = tl.load(SLOPES + row + o_m, mask=o_m < M, other=0.0)
        if tl.max(tl.where(b_slope != 0.0, 1, 0)) > 0:
            b_winner = tl.load(WINNERS + row + o_m, mask=o_m < M, other=-1)
            p_k = K + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * stride_k + o_d[None, :]
            b_k = tl.load(p_k, mask=(o_d < D)[None, :], other=0.0)
            b_a = tl.where(b_winner[None, :] == o_n[:, None], b_slope[None, :], 0.0)
            b_sum = dot(to_type(b_a, K.dtype.element_ty), b_k, b_sum, PRECISION)
    b_sum = b_sum * tl.load(UNITS + i_sample)
    o_row = (i_sample.to(tl.int64) * N + o_n)[:, None]
    m_out = (o_n < N)[:, None] & (o_d < D)[None, :]
    tl.store(DX + o_row * D + o_d[None, :], to_type(b_sum, DX.dtype.element_ty), mask=m_out)


@triton.jit
def codebook_kernel(
    X, K, G, WEIGHTS, SLOPES, WINNERS, DX, DOTS,
    samples, N, M, stride_x, stride_k, stride_g,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i_m, i_d) sums weight * g + slope * winner over samples, for a block of codes.

    X: [samples * N, D]. K: [M, D]. G: [samples, D], or None. WEIGHTS, SLOPES: [samples, M]. DX:
    [M, D], or None. DOTS: one for each program, sum slope * <winner, code>, or None.
    """
    i_m, i_d = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < M, o_d < D
    b_values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_won = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_sample in range(0, samples):
        row = tl.cast(i_sample, tl.int64) * M
        b_weight = tl.load(WEIGHTS + row + o_m, mask=m_m, other=0.0)
        if tl.max(tl.where(b_weight != 0.0, 1, 0)) > 0:
            if G is not None:
                b_g = tl.load(G + tl.cast(i_sample, tl.int64) * stride_g + o_d, mask=m_d, other=0.0)
                b_values += b_weight[:, None] * b_g.to(tl.float32)[None, :]
            b_slope = tl.load(SLOPES + row + o_m, mask=m_m, other=0.0)
            b_winner = tl.load(WINNERS + row + o_m, mask=m_m, other=-1)
            m_won = (b_winner >= 0) & (b_winner < N) & (b_slope != 0.0)
            o_x = tl.cast(i_sample, tl.int64) * N + tl.where(m_won, b_winner, 0)
            p_x = X + o_x[:, None] * stride_x + o_d[None, :]
            b_x = tl.load(p_x, mask=m_won[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_won += b_slope[:, None] * b_x
    m_out = m_m[:, None] & m_d[None, :]
    if DOTS is not None:
        p_k = K + o_m.to(tl.int64)[:, None] * stride_k + o_d[None, :]
        b_k = tl.load(p_k, mask=m_out, other=0.0).to(tl.float32)
        tl.store(DOTS + i_m * tl.num_programs(1) + i_d, tl.sum(tl.sum(b_won * b_k, 1), 0))
    if DX is not None:
        p_out = DX + o_m.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_out, to_type(b_won + b_values, DX.dtype.element_ty), mask=m_out)


def _tile(n: int, m: int, d: int, warps: int, stages: int) -> tuple[tuple[int, Tile], ...]:
    return ((tiles.ANY, Tile(n, m, d, 1, warps, stages, tiles.COMPILED)),)


TILES = {
    ("pool", "half", 80): _tile(128, 64, 64, 8, 3),
    ("pool", "half", 90): _tile(128, 64, 64, 8, 3),
    ("pool", "half", 100): _tile(128, 64, 64, 8, 3),
    ("pool", "tf32", 80): _tile(128, 64, 32, 8, 3),
    ("pool", "tf32", 90): _tile(128, 64, 32, 8, 3),
    ("pool", "tf32", 100): _tile(128, 64, 32, 8, 3),
    ("pool", "ieee", 80): _tile(64, 64, 32, 8, 3),
    ("pool", "ieee", 90): _tile(64, 64, 32, 8, 3),
    ("pool", "ieee", 100): _tile(64, 32, 32, 4, 3),
    ("tokens", "half", 80): _tile(64, 64, 128, 4, 3),
    ("tokens", "half", 90): _tile(64, 64, 128, 4, 3),
    ("tokens", "half", 100): _tile(64, 64, 128, 4, 3),
    ("tokens", "tf32", 80): _tile(64, 32, 64, 4, 3),
    ("tokens", "tf32", 90): _tile(64, 32, 64, 4, 3),
    ("tokens", "tf32", 100): _tile(64, 32, 64, 4, 3),
    ("tokens", "ieee", 80): _tile(64, 32, 32, 4, 3),
    ("tokens", "ieee", 90): _tile(64, 32, 32, 4, 3),
    ("tokens", "ieee", 100): _tile(64, 32, 32, 4, 3),
}
# codes and a part of the width of a program of codebook_kernel
CODES = {"BLOCK_M": 128 if INTERPRETED else 32, "BLOCK_D": 128, "num_warps": 8}


def constants(kernel: str, D: int, kind: str, tile: Tile) -> dict[str, int | str]:
    """What a launch of "pool" or "tokens" is compiled for, beside the types of its arguments."""
    made = tiles.constants(kernel, D, kind, tile)
    del made["HALVES"]
    return made


def forward(
    tokens: Tensor, codebook: Tensor, scale: Tensor, mask: Tensor | None, padded_score: float
) -> tuple[Tensor, Tensor]:
    """Scores float32 and winners int32, both [B, C]; -1 where a padded place has more.

    Args:
        tokens, codebook: [B, N, D] and [C, D], both float32, bfloat16 or float16; no empty side.
        scale: 0-dim, on the device of tokens, where the kernel reads it, or on the CPU.
        mask: bool [B, N], or None.
    """
    (B, N, D), C = tokens.shape, codebook.shape[0]
    x, codes = _rows(tokens), dense(codebook)
    other = torch.full((B,), -INF.value, dtype=torch.float32, device=x.device)
    if mask is not None:
        other = other.masked_fill(~mask.all(1), padded_score)
        mask = mask.contiguous().view(torch.uint8)
    tile = tiles.pick("pool", x, B * N, C, table=TILES)
    blocks = triton.cdiv(C, tile.m)
    samples_per_split = triton.cdiv(B, min(B, max(1, PROGRAMS // blocks)))
    best = float32(x, B, C)
    winners = torch.empty((B, C), dtype=torch.int32, device=x.device)
    with guard(x):
        pool_kernel[(blocks, triton.cdiv(B, samples_per_split))](
            x, codes, on_device(scale, x.device), mask, other, best, winners,
            B, N, C, x.stride(0), codes.stride(0), samples_per_split,
            **constants("pool", D, tiles.kind_of(x.dtype), tile),
        )  # fmt: skip
    return best, winners


def weighted(weights: Tensor, codebook: Tensor) -> Tensor:
    """weights [B, C] times codebook [C, D], in float32."""
    total = weights.new_zeros((weights.shape[0], codebook.shape[1]))
    for part in _parts(codebook):
        total.addmm_(weights[:, part], codebook[part].float())
    return total


def dots(g: Tensor, codebook: Tensor) -> Tensor:
    """<g_b, code_c> in float32, [B, C]."""
    out = float32(g, g.shape[0], codebook.shape[0])
    for part in _parts(codebook):
        torch.mm(g.float(), codebook[part].float().T, out=out[:, part])
    return out


def _parts(codebook: Tensor) -> Iterator[slice]:
    return (slice(i, i + PART) for i in range(0, len(codebook), PART))


def backward(
    g: Tensor | None,
    shares: Tensor,
    slopes: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    scale: Tensor,
    winners: Tensor,
    need_tokens: bool,
    need_codebook: bool,
    need_dots: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dtokens, dcodebook and sum slope * score (float64) of what tokens won; None if not needed.

    Args:
        g: [B, D], the upstream gradient of pooled, or None.
        shares: float32 [B, C], what each code takes of g.
        slopes: float32 [B, C], the gradient of the scores.
        tokens, codebook, scale: as in `forward`.
        winners: int32 [B, C].
    """
    (B, N, D), C = tokens.shape, codebook.shape[0]
    x, codes, scale = _rows(tokens), dense(codebook), on_device(scale, tokens.device)
    d_tokens = x.new_empty((B, N, D)) if need_tokens else None
    d_codebook = codes.new_empty((C, D)) if need_codebook else None
    sums = None
    with guard(x):
        if d_tokens is not None:
            unit = slopes.abs().amax(1, keepdim=True)
            unit = torch.where(unit == 0, 1.0, unit)
            tile = tiles.pick("tokens", x, N, C, table=TILES)
            tokens_kernel[(triton.cdiv(D, tile.d), triton.cdiv(N, tile.n), B)](
                codes, slopes / unit, unit * scale, winners, d_tokens, N, C, codes.stride(0),
                **constants("tokens", D, tiles.kind_of(x.dtype), tile),
            )  # fmt: skip
        if need_codebook or need_dots:
            grid = (triton.cdiv(C, CODES["BLOCK_M"]), triton.cdiv(D, CODES["BLOCK_D"]))
            sums = float32(x, *grid) if need_dots else None
            codebook_kernel[grid](
                x, codes, None if g is None else g.contiguous(), shares, slopes * scale, winners,
                d_codebook, sums, B, N, C, x.stride(0), codes.stride(0), D, D=D, **CODES,
            )  # fmt: skip
    return d_tokens, d_codebook, None if sums is None else sums.sum(dtype=torch.float64)


def _rows(tokens: Tensor) -> Tensor:
    """[B * N, D] with neighbouring elements in every row; a copy where samples are apart."""
    return dense(tokens.detach().reshape(-1, tokens.shape[2]))
