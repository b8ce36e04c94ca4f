"""What the Triton kernels share: pieces of a tile, and how a launch learns about its device.

Every kernel here runs on a card and, where TRITON_INTERPRET=1 was set before triton was imported,
in Triton's interpreter on CPU tensors. The interpreter multiplies the raw bits of bfloat16 and
cuts float32 off when it becomes bfloat16; `dot` and `to_type` are right in both.

Prefixes say what a value is: `i_` an index of a program or a loop, `o_` a vector of offsets,
`m_` a mask, `p_` pointers, `b_` a tile or a vector of one in registers.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# neighbouring programs share rows and columns in the cache: squares of this many tiles
TILE_GROUP = tl.constexpr(8)


class Tile(NamedTuple):
    """How one kernel cuts its problem.

    n, m: rows and columns of a tile. d: how much of the depth is in flight at once.
    halves: 2 where the epilogue takes the tile in two halves of its columns, for registers.
    decided: what made this entry what it is.
    """

    n: int
    m: int
    d: int
    halves: int
    warps: int
    stages: int
    decided: str


def architecture(device: torch.device) -> int:
    """80, 90 or 100: whose tiles `device` takes."""
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has neither tensor memory nor the shared memory of 10.x: the oldest tiles fit it
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the card of `x`."""
    if INTERPRETED:
        # log2(0) and inf - inf are silent on a card
        return np.errstate(all="ignore")
    return torch.cuda.device(x.device)


def precision() -> str:
    """ "tf32" where torch's own float32 products may use it, otherwise "ieee"."""
    matmul = torch.backends.cuda.matmul
    # the older setting raises once the newer has been used, and the newer knows of the older
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def float32(like: Tensor, *shape: int) -> Tensor:
    """Unwritten memory on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dense(x: Tensor) -> Tensor:
    """`x` with neighbouring elements in every row; rows may have any stride."""
    x = x.detach()
    return x if x.stride(1) == 1 else x.contiguous()


def on_device(x: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 0-dim `x` as `dtype` on `device`; nothing waits for a card."""
    if x.device == device:
        return x.detach().to(dtype)
    return torch.full((), x.item(), dtype=dtype, device=device)


@triton.jit
def dot(b_a, b_b, b_c, PRECISION: tl.constexpr):
    """`b_c + b_a b_b` in float32."""
    if _INTERPRETED:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_c, input_precision="ieee")
    else:
        # what the types of half the size are multiplied in is no matter of precision
        return tl.dot(b_a, b_b, b_c, input_precision="ieee" if PRECISION == "half" else PRECISION)


@triton.jit
def to_type(b_x, TYPE: tl.constexpr):
    """float32 `b_x` rounded to the nearest of TYPE."""
    if _INTERPRETED and tl.bfloat16 == TYPE:
        b_bits = b_x.to(tl.int32, bitcast=True)
        # half of the last place kept, ties to even; a NaN stays one
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(TYPE)


@triton.jit
def halves(b_x):
    """Left and right half of a tile's columns."""
    ROWS: tl.constexpr = b_x.shape[0]
    COLUMNS: tl.constexpr = b_x.shape[1]
    return tl.split(tl.permute(tl.reshape(b_x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def start_of(i_tile, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first row and column of a tile of [N, M], each tile by one program."""
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = i_tile // (TILE_GROUP * tiles_m) * TILE_GROUP
    height = tl.minimum(tiles_n - first, TILE_GROUP)
    inside = i_tile % (TILE_GROUP * tiles_m)
    return (first + inside % height) * BLOCK_N, inside // height * BLOCK_M


@triton.jit
def products(
    X, Y, o_x, o_y, stride_x, stride_y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile of X Y^T at the rows o_x and o_y, which must exist. X, Y: [*, D]."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = X + o_x.to(tl.int64)[:, None] * stride_x + o_d[None, :]
    p_y = Y + o_y.to(tl.int64)[:, None] * stride_y + o_d[None, :]
    b_s = tl.zeros([o_x.shape[0], o_y.shape[0]], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            b_x = tl.load(p_x + i_d)
            b_y = tl.load(p_y + i_d)
        else:
            m_d = (i_d + o_d < D)[None, :]
            b_x = tl.load(p_x + i_d, mask=m_d, other=0.0)
            b_y = tl.load(p_y + i_d, mask=m_d, other=0.0)
        b_s = dot(b_x, tl.trans(b_y), b_s, PRECISION)
    return b_s


@triton.jit
def fill_left_out(
    b_x, FILL: tl.constexpr, o_n, o_m, N, M, N_IDS, M_IDS, MASK, stride_mask_n, stride_mask_m
):  # fmt: skip
    """`b_x` with FILL where a pair is left out or lies outside of [N, M].

    N_IDS, M_IDS: int64 [N] and [M], or None. MASK: uint8 [N, M], 0 leaves out, or None.
    """
    m_n = o_n < N
    m_m = o_m < M
    b_x = tl.where(m_n[:, None] & m_m[None, :], b_x, FILL)
    if N_IDS is not None:
        b_n = tl.load(N_IDS + tl.minimum(o_n, N - 1))
        b_m = tl.load(M_IDS + tl.minimum(o_m, M - 1))
        # most tiles hold ids of two ranges that do not meet: then no pair is compared
        if (tl.min(b_n) <= tl.max(b_m)) & (tl.min(b_m) <= tl.max(b_n)):
            b_x = tl.where(b_n[:, None] == b_m[None, :], FILL, b_x)
    if MASK is not None:
        p_mask = MASK + o_n.to(tl.int64)[:, None] * stride_mask_n
        p_mask += o_m.to(tl.int64)[None, :] * stride_mask_m
        b_mask = tl.load(p_mask, mask=m_n[:, None] & m_m[None, :], other=0)
        b_x = tl.where(b_mask != 0, b_x, FILL)
    return b_x
