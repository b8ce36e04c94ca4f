"""Kernels of pairwise_lse, backward.

With G_ij = g_i exp(s_ij - rows_i) + h_j exp(s_ij - columns_j), the sums needed are G k and G^T q.

    D <= 128: a kernel per side computes G tile by tile and multiplies it at once (4 products).
    D  > 128: the sum of a row block does not fit in registers. A chunk of G goes to a workspace,
              and two ordinary products take it from there (3 products).

    bfloat16, float16 in -> float32 products and G, G rounded to the type of the inputs for its
                            products, float32 sums, gradients rounded once
    float32 in           -> float32 throughout, products in tf32 where torch's own may use it

No atomic addition anywhere: every sum has one owner and one order.
"""

import triton
import triton.language as tl

from mmfast.kernels._tile import (
    INF,
    LOG2E,
    dot,
    fill_left_out,
    halves,
    products,
    start_of,
    to_type,
)


@triton.jit
def load_side(G, LSE, UNIT, o_x, size):
    """Upstream gradients times UNIT, and sums in base 2, of a side's rows; zeros without G."""
    b_g = tl.zeros(o_x.shape, tl.float32)
    b_lse = tl.zeros(o_x.shape, tl.float32)
    if G is not None:
        o_x = tl.minimum(o_x, size - 1)
        b_g = tl.load(G + o_x)
        if UNIT is not None:
            b_g *= tl.load(UNIT)
        b_lse = tl.load(LSE + o_x) * LOG2E
        # an empty row: exp2(-inf) is its weight, and not the NaN of -inf - -inf
        b_lse = tl.where(b_lse == -INF, INF, b_lse)
    return b_g, b_lse


@triton.jit
def score_gradient(
    b_s, b_g_n, b_lse_n, b_g_m, b_lse_m, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """G of a tile of scores in base 2, from the side's rows that have upstream gradients."""
    b_g = tl.zeros(b_s.shape, tl.float32)
    if ROWS:
        b_g += b_g_n[:, None] * tl.exp2(b_s - b_lse_n[:, None])
    if COLUMNS:
        b_g += b_g_m[None, :] * tl.exp2(b_s - b_lse_m[None, :])
    return b_g


@triton.jit
def gradient_kernel(
    Q, K, SCALE, Q_IDS, K_IDS, MASK, G_ROWS, ROWS, G_COLUMNS, COLUMNS, UNIT, G, DOTS,
    N, M, stride_q, stride_k, stride_mask_n, stride_mask_m, stride_g,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of G, in the type of the inputs, and an entry of DOTS [tiles], sum G_ij <q_i, k_j>.

    Either may be None, as may be the upstream gradients of one side. G has memory for whole tiles
    and is 0 beyond [N, M].
    """
    i_tile = tl.program_id(0)
    start_n, start_m = start_of(i_tile, N, M, BLOCK_N, BLOCK_M)
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_q = tl.minimum(o_n, N - 1)
    o_k = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1)
    b_dots = products(Q, K, o_q, o_k, stride_q, stride_k, D, BLOCK_D, PRECISION)
    scale2 = tl.load(SCALE) * LOG2E
    b_g_n, b_lse_n = load_side(G_ROWS, ROWS, UNIT, o_n, N)
    b_parts = (b_dots,) if HALVES == 1 else halves(b_dots)
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    total = 0.0
    for i_half in tl.static_range(HALVES):
        o_m = start_m + i_half * WIDTH + tl.arange(0, WIDTH)
        b_g_m, b_lse_m = load_side(G_COLUMNS, COLUMNS, UNIT, o_m, M)
        b_g = score_gradient(
            b_parts[i_half] * scale2, b_g_n, b_lse_n, b_g_m, b_lse_m,
            G_ROWS is not None, G_COLUMNS is not None,
        )  # fmt: skip
        b_g = fill_left_out(
            b_g, 0.0, o_n, o_m, N, M, Q_IDS, K_IDS, MASK, stride_mask_n, stride_mask_m
        )
        if G is not None:
            p_g = G + o_n.to(tl.int64)[:, None] * stride_g + o_m[None, :]
            tl.store(p_g, to_type(b_g, G.dtype.element_ty))
        if DOTS is not None:
            # a pair left out counts nothing, be its product infinite
            total += tl.sum(tl.where(b_g == 0.0, 0.0, b_g * b_parts[i_half]))
    if DOTS is not None:
        tl.store(DOTS + i_tile, total)


@triton.jit
def product_kernel(
    A, B, OUT, N, K, stride_an, stride_ak, stride_b, stride_out,
    D: tl.constexpr, FRESH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT (+)= A B for A [N, K], either of whose strides is 1, B [K, D] and float32 OUT [N, D].

    A has whole tiles of memory: no mask on its loads, which would cut vectors short. It is 0 from
    K on. FRESH: what OUT holds does not count.
    """
    i_tile = tl.program_id(0)
    TILES_D: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    start_d = i_tile % TILES_D * BLOCK_M
    o_n = i_tile // TILES_D * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = start_d + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_D)
    b_out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_k in range(0, K, BLOCK_D):
        o_ik = (i_k + o_k).to(tl.int64)
        b_a = tl.load(A + o_n.to(tl.int64)[:, None] * stride_an + o_ik[None, :] * stride_ak)
        p_b = B + o_ik[:, None] * stride_b + o_d[None, :]
        if D % BLOCK_M == 0:
            b_b = tl.load(p_b, mask=(o_ik < K)[:, None], other=0.0)
        else:
            b_b = tl.load(p_b, mask=(o_ik < K)[:, None] & (o_d < D)[None, :], other=0.0)
        b_out = dot(b_a, b_b, b_out, PRECISION)
    b_parts = (b_out,) if HALVES == 1 else halves(b_out)
    WIDTH: tl.constexpr = BLOCK_M // HALVES
    for i_half in tl.static_range(HALVES):
        o_part = start_d + i_half * WIDTH + tl.arange(0, WIDTH)
        p_out = OUT + o_n.to(tl.int64)[:, None] * stride_out + o_part[None, :]
        m_out = (o_n < N)[:, None] & (o_part < D)[None, :]
        b_part = b_parts[i_half]
        if not FRESH:
            b_part += tl.load(p_out, mask=m_out, other=0.0)
        tl.store(p_out, b_part, mask=m_out)


@triton.jit
def flash_kernel(
    X, Y, SCALE, X_IDS, Y_IDS, G_X, LSE_X, G_Y, LSE_Y, UNIT, DX, DOTS, N, M, stride_x, stride_y,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DX [N, D] = scale G Y of a block of rows; DOTS [N] = <x_i, (G Y)_i>, or None.

    BLOCK_D >= D. With the sides' roles swapped it gives the other gradient. There is no mask: its
    pointers take registers that the sum needs.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = tl.minimum(o_n, N - 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    scale = tl.load(SCALE)
    p_x = X + o_x.to(tl.int64)[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m_d, other=0.0)
    b_g_n, b_lse_n = load_side(G_X, LSE_X, UNIT, o_n, N)
    b_dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_m in range(0, M, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        o_y = tl.minimum(o_m, M - 1)
        p_y = Y + o_y.to(tl.int64)[:, None] * stride_y + o_d[None, :]
        b_y = tl.load(p_y, mask=m_d, other=0.0)
        b_s = dot(b_x, tl.trans(b_y), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        b_g_m, b_lse_m = load_side(G_Y, LSE_Y, UNIT, o_m, M)
        b_g = score_gradient(
            b_s * (scale * LOG2E), b_g_n, b_lse_n, b_g_m, b_lse_m,
            G_X is not None, G_Y is not None,
        )  # fmt: skip
        b_g = fill_left_out(b_g, 0.0, o_n, o_m, N, M, X_IDS, Y_IDS, None, 0, 0)
        b_dx = dot(to_type(b_g, Y.dtype.element_ty), b_y, b_dx, PRECISION)
    if UNIT is not None:
        b_dx /= tl.load(UNIT)
    if DOTS is not None:
        tl.store(DOTS + o_n, tl.sum(b_dx * b_x.to(tl.float32), 1), mask=m_n)
    p_dx = DX + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_dx, to_type(b_dx * scale, DX.dtype.element_ty), mask=m_n[:, None] & m_d)
