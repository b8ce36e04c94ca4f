"""The sum of softplus over all scores and its gradients, chunk by chunk of G = softplus'.

    bfloat16, float16 in -> float32 products, softplus and G, G rounded to the type of the inputs
                            for its products, float32 gradients
    float32 in           -> float32 throughout, products in tf32 where torch's own may use it

A tile is summed in float32, tiles in float64. No atomic addition: every sum has one owner and one
order. Nothing here reads back from a card, so that a call can be captured in a CUDA graph (with
scale and bias on the card: numbers on the CPU become part of the graph).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _chunks as chunks
from mmfast.kernels import _tiles as tiles
from mmfast.kernels._chunks import LIBRARY_PRODUCTS, WORKSPACE_BYTES
from mmfast.kernels._tile import (
    INF,
    LN2,
    LOG2E,
    dense,
    fill_left_out,
    float32,
    guard,
    halves,
    on_device,
    products,
    start_of,
    to_type,
)

# G is at most 1: this brings it to the top of float16, so that the least slope it holds is 2e-12
HALF_UNIT = 2.0**15


def forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    need_q: bool = False,
    need_k: bool = False,
    need_scale: bool = False,
    need_bias: bool = False,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    library: bool = LIBRARY_PRODUCTS,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(sum, dq, dk, dscale, dbias): float32 but for the last two, float64; None if not needed.

    Args:
        q, k: [N, D] and [M, D], both float32, bfloat16 or float16; no empty side.
        scale, bias: 0-dim, on the device of q, where a kernel reads them, or on the CPU.
        q_ids, k_ids: int64 [N] and [M]; a pair with equal ids is left out.
        workspace_bytes: the most a chunk of G may take, at least 256 rows and columns.
        library: whether a library multiplies the chunks, or Triton.
    """
    q, k, q_ids, k_ids = dense(q), dense(k), *(_contiguous(x) for x in (q_ids, k_ids))
    scale, bias = on_device(scale, q.device), on_device(bias, q.device)
    dq = float32(q, *q.shape) if need_q else None
    dk = float32(k, *k.shape) if need_k else None
    dots_alone = need_scale and not (need_q or need_k)
    sums: list[Tensor] = []
    unit = HALF_UNIT if q.dtype == torch.float16 else 1.0

    def visit(rows: slice, columns: slice, g: Tensor | None) -> None:
        ids = (None, None) if q_ids is None or k_ids is None else (q_ids[rows], k_ids[columns])
        sums.append(_visit(q[rows], k[columns], scale, bias, *ids, g, unit, need_bias, dots_alone))

    with guard(q):
        dots = chunks.gradients(
            visit, q, k, dq, dk, scale / unit, need_scale and not dots_alone,
            workspace_bytes, library,
        )  # fmt: skip
        total, slopes, dots_of_tiles = (x.sum() for x in torch.stack(sums, 1))
    if dots_alone:
        dots = dots_of_tiles
    elif dots is not None:
        dots = dots / unit
    return (total * LN2.value).float(), dq, dk, dots, slopes if need_bias else None


def _contiguous(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.contiguous()


def _visit(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    g: Tensor | None,
    unit: float,
    need_slopes: bool,
    need_dots: bool,
) -> Tensor:
    """Makes `g` and returns what softplus_kernel sums, over all tiles: [3] float64."""
    (N, D), M = q.shape, k.shape[0]
    tile = tiles.pick("softplus", q, N, M)
    sums = q.new_zeros((3, triton.cdiv(N, tile.n) * triton.cdiv(M, tile.m)), dtype=torch.float32)
    softplus_kernel[(sums.shape[1],)](
        q, k, scale, bias, q_ids, k_ids, g, sums,
        N, M, q.stride(0), k.stride(0), 0 if g is None else g.stride(0), sums.stride(0),
        UNIT=unit, SLOPES=need_slopes, DOTS=need_dots,
        **tiles.constants("softplus", D, tiles.kind_of(q.dtype), tile),
    )  # fmt: skip
    return sums.sum(1, dtype=torch.float64)


@triton.jit
def softplus2(b_s):
    """log2(1 + 2^s) and its slope; both keep their relative accuracy where they are tiny."""
    b_e = tl.exp2(-tl.abs(b_s))
    # log2(1 + e) / e on [0, 1], as csrc/cpu/vmath.h has it
    b_p = 0.007548804519646 * b_e - 0.04256564511657
    b_p = b_p * b_e + 0.1128540840101
    b_p = b_p * b_e - 0.1971173970761
    b_p = b_p * b_e + 0.2756408086289
    b_p = b_p * b_e - 0.3584083678718
    b_p = b_p * b_e + 0.480692954539
    b_p = b_p * b_e - 0.7213402089835
    b_p = b_p * b_e + 1.442694997456
    b_slope = tl.where(b_s > 0.0, 1.0, b_e) / (1.0 + b_e)
    return tl.maximum(b_s, 0.0) + b_e * b_p, b_slope


@triton.jit
def softplus_kernel(
    Q, K, SCALE, BIAS, Q_IDS, K_IDS, G, SUMS,
    N, M, stride_q, stride_k, stride_g, stride_sums,
    UNIT: tl.constexpr, SLOPES: tl.constexpr, DOTS: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of UNIT G, in the type of the inputs, and a column of SUMS [3, tiles].

    SUMS: of the softplus in units of log 2 and, where SLOPES and DOTS say so, of G_ij and of
    G_ij <q_i, k_j>. G has memory for whole tiles and is 0 beyond [N, M]; or it is None.
    """
    i_tile = tl.program_id(0)
    start_n, start_m = start_of(i_tile, N, M, BLOCK_N, BLOCK_M)
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_q = tl.minimum(o_n, N - 1)
    o_k = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1)
    b_dots = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION)
    scale2, bias2 = tl.load(SCALE) * LOG2E, tl.load(BIAS) * LOG2E
    b_parts = (b_dots,) if HALVES == 1 else halves(b_dots)
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    total, slopes, dots = 0.0, 0.0, 0.0
    for i_half in tl.static_range(HALVES):
        o_m = start_m + i_half * WIDTH + tl.arange(0, WIDTH)
        b_s = b_parts[i_half] * scale2 + bias2
        # the softplus of -inf is 0, and so is its slope
        b_s = fill_left_out(b_s, -INF, o_n, o_m, N, M, Q_IDS, K_IDS, None, 0, 0)
        b_value, b_g = softplus2(b_s)
        total += tl.sum(b_value)
        if SLOPES:
            slopes += tl.sum(b_g)
        if DOTS:
            # a pair left out counts nothing, be its product infinite
            dots += tl.sum(tl.where(b_g == 0.0, 0.0, b_g * b_parts[i_half]))
        if G is not None:
            p_g = G + o_n.to(tl.int64)[:, None] * stride_g + o_m[None, :]
            tl.store(p_g, to_type(b_g * UNIT, G.dtype.element_ty))
    tl.store(SUMS + i_tile, total)
    if SLOPES:
        tl.store(SUMS + stride_sums + i_tile, slopes)
    if DOTS:
        tl.store(SUMS + 2 * stride_sums + i_tile, dots)
