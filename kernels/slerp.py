"""Spherical interpolation of paired rows: Triton kernels.

A program owns a few whole rows: their inner products first, then what follows from them. Rows of
at most WIDEST elements stay in registers between the two; longer ones are read a second time, from
the cache.

    bfloat16, float16, float32 in -> float32 arithmetic -> results in the input's type

The formulas are those of csrc/slerp.h, with its bounds; only the arccosine and the sines are
written out, so that the compiler and the interpreter compute them alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._tile import dense, guard, to_type

# elements of one operand that a program holds at a time, and of one row at most
HELD = 2048
WIDEST = 1024
WARPS = 4

LOWEST = tl.constexpr(-1 + 2.0**-23)
PI = tl.constexpr(3.141592653589793)
PI_HIGH, PI_LOW = tl.constexpr(3.140625), tl.constexpr(9.67653589793e-4)


@triton.jit
def series(b_y):
    """(y - sin y) / y^3 for |y| <= pi / 2."""
    b_z = b_y * b_y
    b_sum = 1 / 6227020800.0 - b_z * (1 / 1307674368000.0)
    b_sum = 1 / 39916800.0 - b_z * b_sum
    b_sum = 1 / 362880.0 - b_z * b_sum
    b_sum = 1 / 5040.0 - b_z * b_sum
    b_sum = 1 / 120.0 - b_z * b_sum
    return 1 / 6.0 - b_z * b_sum


@triton.jit
def sine(b_y):
    """sin y, relatively exact near 0. tl.sin is right for huge y as well, at 5 times the code."""
    b_turns = tl.floor(b_y * (1 / PI) + 0.5)
    # pi in two parts, the first of few bits, so that near a multiple of it no digit is lost
    b_r = (b_y - b_turns * PI_HIGH) - b_turns * PI_LOW
    b_odd = b_turns - 2.0 * tl.floor(b_turns * 0.5)
    return (1.0 - 2.0 * b_odd) * (b_r - b_r * b_r * b_r * series(b_r))


@triton.jit
def cosine(b_y):
    b_half = sine(0.5 * b_y)
    return 1.0 - 2.0 * b_half * b_half


@triton.jit
def sine_rest(b_y, b_sine):
    """(y - sin y) / y^3, by its series where the difference would cancel."""
    b_far = b_y * b_y > 2.25
    b_safe = tl.where(b_far, b_y, 1.0)
    return tl.where(b_far, (b_y - b_sine) / (b_safe * b_safe * b_safe), series(b_y))


@triton.jit
def angle(b_c):
    """cos(theta) bounded, theta, sin(theta) and theta / sin(theta), from the cosine."""
    # written so that a NaN stays one
    b_c = tl.where(b_c < LOWEST, LOWEST, tl.where(b_c > 1.0, 1.0, b_c))
    b_size = tl.abs(b_c)
    b_large = b_size > 0.5
    # arcsin x, from which arccos |c| is pi / 2 - arcsin |c|, or twice that of sqrt((1 - |c|) / 2)
    b_z = tl.where(b_large, (1.0 - b_size) * 0.5, b_size * b_size)
    b_x = tl.sqrt(b_z)
    b_p = 0.04221905935 * b_z + 0.02414732916
    b_p = b_p * b_z + 0.04547715006
    b_p = b_p * b_z + 0.07495241395
    b_p = b_p * b_z + 0.1666675394
    b_arcsine = b_x + b_x * b_z * b_p
    b_theta = tl.where(b_large, 2.0 * b_arcsine, PI / 2 - b_arcsine)
    b_theta = tl.where(b_c < 0, PI - b_theta, b_theta)
    # from c itself: the sine of a rounded angle near pi has lost what 1 + c still knows
    b_sine = tl.sqrt((1.0 - b_c) * (1.0 + b_c))
    b_zero = b_theta == 0
    return b_c, b_theta, b_sine, tl.where(b_zero, 1.0, b_theta / tl.where(b_zero, 1.0, b_sine))


@triton.jit
def weight(b_c, b_theta, b_sine, b_lam):
    """sin(lam theta) / sin(theta)"""
    b_zero = b_theta == 0
    b_safe = tl.where(b_zero, 1.0, b_sine)
    # sin(theta - rest): 1 at lam = 1 whatever the angle, as the other is 0 at lam = 0
    b_rest = (1.0 - b_lam) * b_theta
    b_from_a = cosine(b_rest) - b_c * sine(b_rest) / b_safe
    b_weight = tl.where(b_lam > 0.5, b_from_a, sine(b_lam * b_theta) / b_safe)
    return tl.where(b_zero, b_lam, b_weight)


@triton.jit
def weight_by_c(b_theta, b_sine, b_ratio, b_lam):
    """The weight's derivative by c."""
    b_plus, b_minus = 1.0 + b_lam, 1.0 - b_lam
    b_sine_plus, b_sine_minus = sine(b_plus * b_theta), sine(b_minus * b_theta)
    b_wide = b_theta > 1.0
    b_safe = tl.where(b_wide, b_sine, 1.0)
    b_far = 0.5 * (b_minus * b_sine_plus - b_plus * b_sine_minus) / (b_safe * b_safe * b_safe)
    b_rest = b_plus * b_plus * sine_rest(b_plus * b_theta, b_sine_plus)
    b_rest -= b_minus * b_minus * sine_rest(b_minus * b_theta, b_sine_minus)
    b_near = -0.5 * b_plus * b_minus * b_rest * b_ratio * b_ratio * b_ratio
    return tl.where(b_wide, b_far, b_near)


@triton.jit
def load_rows(X, o_n, o_d, N, D: tl.constexpr, stride):
    m_x = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_x = X + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store_rows(X, o_n, o_d, N, D: tl.constexpr, b_x):
    m_x = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_x = X + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_x, to_type(b_x, X.dtype.element_ty), mask=m_x)


@triton.jit
def mix_rows(
    OUT, o_n, N, D: tl.constexpr, b_k, X, stride_x, b_l, Y, stride_y, BLOCK_D: tl.constexpr
):
    """OUT = k X + l Y, for rows too long to be held."""
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_x = load_rows(X, o_n, o_d, N, D, stride_x)
        b_y = load_rows(Y, o_n, o_d, N, D, stride_y)
        store_rows(OUT, o_n, o_d, N, D, b_k[:, None] * b_x + b_l[:, None] * b_y)


@triton.jit
def forward_kernel(
    A, B, LAM, OUT, N, stride_a, stride_b, stride_lam,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    b_a = load_rows(A, o_n, o_d, N, D, stride_a)
    b_b = load_rows(B, o_n, o_d, N, D, stride_b)
    b_c = tl.sum(b_a * b_b, 1)
    for i_d in range(BLOCK_D, D, BLOCK_D):
        b_x = load_rows(A, o_n, i_d + o_d, N, D, stride_a)
        b_c += tl.sum(b_x * load_rows(B, o_n, i_d + o_d, N, D, stride_b), 1)
    b_lam = tl.load(LAM + o_n * stride_lam, mask=o_n < N, other=0.0)
    b_c, b_theta, b_sine, _ = angle(b_c)
    b_k1 = weight(b_c, b_theta, b_sine, b_lam)
    b_k2 = weight(b_c, b_theta, b_sine, 1.0 - b_lam)
    if D <= BLOCK_D:
        store_rows(OUT, o_n, o_d, N, D, b_k1[:, None] * b_a + b_k2[:, None] * b_b)
    else:
        mix_rows(OUT, o_n, N, D, b_k1, A, stride_a, b_k2, B, stride_b, BLOCK_D)


@triton.jit
def backward_kernel(
    G, A, B, LAM, DA, DB, DLAM, N, stride_g, stride_a, stride_b, stride_lam,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """DA, DB, DLAM: each None where it is not asked for."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    b_g = load_rows(G, o_n, o_d, N, D, stride_g)
    b_a = load_rows(A, o_n, o_d, N, D, stride_a)
    b_b = load_rows(B, o_n, o_d, N, D, stride_b)
    b_c = tl.sum(b_a * b_b, 1)
    b_along_a = tl.sum(b_g * b_a, 1)
    b_along_b = tl.sum(b_g * b_b, 1)
    for i_d in range(BLOCK_D, D, BLOCK_D):
        b_x = load_rows(G, o_n, i_d + o_d, N, D, stride_g)
        b_y = load_rows(A, o_n, i_d + o_d, N, D, stride_a)
        b_z = load_rows(B, o_n, i_d + o_d, N, D, stride_b)
        b_c += tl.sum(b_y * b_z, 1)
        b_along_a += tl.sum(b_x * b_y, 1)
        b_along_b += tl.sum(b_x * b_z, 1)
    b_lam = tl.load(LAM + o_n * stride_lam, mask=o_n < N, other=0.0)
    b_rest = 1.0 - b_lam
    b_c, b_theta, b_sine, b_ratio = angle(b_c)
    if DLAM is not None:
        b_dlam = b_along_a * cosine(b_lam * b_theta) - b_along_b * cosine(b_rest * b_theta)
        tl.store(DLAM + o_n, b_dlam * b_ratio, mask=o_n < N)
    if DA is not None or DB is not None:
        b_by_c = b_along_a * weight_by_c(b_theta, b_sine, b_ratio, b_lam)
        b_by_c += b_along_b * weight_by_c(b_theta, b_sine, b_ratio, b_rest)
        b_k1 = weight(b_c, b_theta, b_sine, b_lam)
        b_k2 = weight(b_c, b_theta, b_sine, b_rest)
        if D <= BLOCK_D:
            if DA is not None:
                store_rows(DA, o_n, o_d, N, D, b_k1[:, None] * b_g + b_by_c[:, None] * b_b)
            if DB is not None:
                store_rows(DB, o_n, o_d, N, D, b_k2[:, None] * b_g + b_by_c[:, None] * b_a)
        else:
            if DA is not None:
                mix_rows(DA, o_n, N, D, b_k1, G, stride_g, b_by_c, B, stride_b, BLOCK_D)
            if DB is not None:
                mix_rows(DB, o_n, N, D, b_k2, G, stride_g, b_by_c, A, stride_a, BLOCK_D)


def forward(a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """The mix of a and b, both [N, D] float32, bfloat16 or float16; lam is float32 [N] or [1]."""
    out = a.new_empty(a.shape)
    a, b = dense(a), dense(b)
    constants = launch_constants(*a.shape)
    grid = (triton.cdiv(a.shape[0], constants["BLOCK_N"]),)
    with guard(a):
        forward_kernel[grid](
            a, b, lam.detach(), out, a.shape[0], a.stride(0), b.stride(0), lam_stride(lam),
            **constants,
        )  # fmt: skip
    return out


def backward(
    g: Tensor, a: Tensor, b: Tensor, lam: Tensor, need_a: bool, need_b: bool, need_lam: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da, db [N, D] and dlam [N] for the upstream gradient g [N, D], None for what is not asked."""
    da = a.new_empty(a.shape) if need_a else None
    db = b.new_empty(b.shape) if need_b else None
    dlam = lam.new_empty(a.shape[0], dtype=torch.float32) if need_lam else None
    g, a, b = dense(g), dense(a), dense(b)
    constants = launch_constants(*a.shape)
    grid = (triton.cdiv(a.shape[0], constants["BLOCK_N"]),)
    with guard(a):
        backward_kernel[grid](
            g, a, b, lam.detach(), da, db, dlam,
            a.shape[0], g.stride(0), a.stride(0), b.stride(0), lam_stride(lam),
            **constants,
        )  # fmt: skip
    return da, db, dlam


def launch_constants(N: int, D: int) -> dict[str, int]:
    """What both kernels are compiled for."""
    block_d = min(triton.next_power_of_2(D), WIDEST)
    # no more rows than there are, up to a power of two
    block_n = min(HELD // block_d, triton.next_power_of_2(N))
    return {"D": D, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": WARPS}


def lam_stride(lam: Tensor) -> int:
    """0 where one lam is that of all rows."""
    return lam.stride(0) if lam.numel() > 1 else 0
