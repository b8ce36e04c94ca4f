"""Log-sum-exp of all scaled similarities and its gradients: which Triton kernels run, on what.

`_pairwise_lse_forward` and `_pairwise_lse_backward` hold the kernels, `_tiles` how
they cut a problem. Nothing here reads back from a card or launches by what tensors hold, so that
a call can be captured in a CUDA graph (with a scale on the card: one on the CPU becomes part of
the graph).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmfast.kernels import _chunks as chunks
from mmfast.kernels import _tiles as tiles
from mmfast.kernels._chunks import LIBRARY_PRODUCTS, WORKSPACE_BYTES
from mmfast.kernels._pairwise_lse_backward import flash_kernel, gradient_kernel
from mmfast.kernels._pairwise_lse_forward import combine_kernel, forward_kernel
from mmfast.kernels._tile import dense, float32, guard, on_device

# beyond it the sum of a block of rows leaves no registers to spare
LARGEST_FLASH_D = 128


def forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows [N], and columns [M] or None, in float32. The rows do not depend on `columns`.

    Args:
        q, k: [N, D] and [M, D], both float32, bfloat16 or float16; no empty side.
        scale: 0-dim, on the device of q, where a kernel reads it, or on the CPU.
        q_ids, k_ids: int64 [N] and [M]; a pair with equal ids is left out.
        mask: bool [N, M] of any strides; a pair where it is False is left out.
    """
    p = Problem.of(q, k, scale, q_ids, k_ids, mask)
    N, M, D = p.sizes
    tile = tiles.pick("forward", q, N, M, p.mask is not None)
    row_blocks, column_tiles = triton.cdiv(N, tile.n), triton.cdiv(M, tile.m)
    blocks_per_group, tiles_per_split = tiles.shares(row_blocks, column_tiles, columns)
    grid = triton.cdiv(row_blocks, blocks_per_group), triton.cdiv(column_tiles, tiles_per_split)
    row_parts = float32(q, 2, grid[1], N)
    column_parts = float32(q, 2, grid[0], M) if columns else None
    with guard(q):
        forward_kernel[grid](
            p.q, p.k, p.scale, p.q_ids, p.k_ids, p.mask, *row_parts,
            *((None, None) if column_parts is None else column_parts),
            N, M, *p.strides, blocks_per_group, tiles_per_split,
            **tiles.constants("forward", D, tiles.kind_of(q.dtype), tile),
        )  # fmt: skip
        return _combine(row_parts), None if column_parts is None else _combine(column_parts)


def backward(
    g_rows: Tensor | None,
    g_columns: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    *,
    flash: bool | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    library: bool = LIBRARY_PRODUCTS,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dscale) in the types and on the devices of q, k and scale; None if not needed.

    Args:
        g_rows, g_columns: upstream gradients [N] and [M] in float32, or None.
        q, ..., mask: as `forward` took them.
        rows, columns: what `forward` returned; each is read only beside its upstream gradient.
        flash: without a workspace, for one product more; only for D <= 128 and without a mask,
            where it is the default.
        workspace_bytes: the most a chunk of G may take, at least 256 rows and columns.
        library: whether a library multiplies the chunks, or Triton.
    """
    p = Problem.of(q, k, scale, q_ids, k_ids, mask, g_rows, rows, g_columns, columns)
    can_flash = q.shape[1] <= LARGEST_FLASH_D and mask is None
    if flash and not can_flash:
        raise ValueError(
            f"pairwise_lse: flash takes D <= {LARGEST_FLASH_D} and no mask, got D={q.shape[1]}"
            + (" and a mask" if mask is not None else "")
        )
    flash = can_flash if flash is None else flash
    dq = dk = total = None
    with guard(q):
        if flash:
            if need_q:
                dq, total = _flash(p, "q", need_scale)
            if need_k:
                dk, total_k = _flash(p, "k", need_scale and total is None)
                total = total_k if total is None else total
        elif need_q or need_k:
            dq, dk, total = _chunked(p, need_q, need_k, need_scale, workspace_bytes, library)
        if need_scale and not (need_q or need_k):
            total = _dots(p)
    # a scale on the CPU beside inputs on a card: here, and only here, the call waits for the card
    return dq, dk, None if total is None else total.to(scale.device, scale.dtype)


class Problem(NamedTuple):
    """What every kernel is given, in the order in which they take it."""

    q: Tensor
    k: Tensor
    scale: Tensor
    q_ids: Tensor | None
    k_ids: Tensor | None
    mask: Tensor | None
    g_rows: Tensor | None
    rows: Tensor | None
    g_columns: Tensor | None
    columns: Tensor | None
    unit: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        q_ids: Tensor | None,
        k_ids: Tensor | None,
        mask: Tensor | None,
        g_rows: Tensor | None = None,
        rows: Tensor | None = None,
        g_columns: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Problem:
        g_rows, rows = _upstream(g_rows, rows)
        g_columns, columns = _upstream(g_columns, columns)
        return cls(
            dense(q),
            dense(k),
            on_device(scale, q.device),
            None if q_ids is None else q_ids.contiguous(),
            None if k_ids is None else k_ids.contiguous(),
            None if mask is None else mask.view(torch.uint8),
            g_rows,
            rows,
            g_columns,
            columns,
            _unit(g_rows, g_columns) if q.dtype == torch.float16 else None,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, M, D."""
        return self.q.shape[0], self.k.shape[0], self.q.shape[1]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of the rows of q and k, and of the mask."""
        of_mask = (0, 0) if self.mask is None else (self.mask.stride(0), self.mask.stride(1))
        return self.q.stride(0), self.k.stride(0), *of_mask

    def part(self, rows: slice, columns: slice) -> Problem:
        """Some rows against some columns."""

        def cut(x: Tensor | None, by: slice) -> Tensor | None:
            return None if x is None else x[by]

        return Problem(
            *(self.q[rows], self.k[columns], self.scale),
            *(cut(self.q_ids, rows), cut(self.k_ids, columns)),
            None if self.mask is None else self.mask[rows, columns],
            *(cut(self.g_rows, rows), cut(self.rows, rows)),
            *(cut(self.g_columns, columns), cut(self.columns, columns), self.unit),
        )


def _upstream(g: Tensor | None, sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    # torch.compile hands on an empty gradient of columns that nobody asked for
    if g is None or sums is None or g.numel() == 0:
        return None, None
    return g.detach().contiguous(), sums.detach()


def _unit(g_rows: Tensor | None, g_columns: Tensor | None) -> Tensor | None:
    """The power of two that brings the largest possible G to the top of float16.

    Without it a G of 1 / N^2 is zero in float16 from N = 4096 on, and a loss scaled up is infinite.
    """
    given = [g.abs().nan_to_num(0.0, 0.0, 0.0) for g in (g_rows, g_columns) if g is not None]
    if not given:
        return None
    exponent = torch.frexp(sum((g.max() for g in given[1:]), given[0].max())).exponent
    return torch.ldexp(torch.ones((), device=exponent.device), (14 - exponent).clamp(-100, 100))


def _combine(parts: Tensor) -> Tensor:
    """[2, parts, N] to [N]."""
    out = float32(parts, parts.shape[2])
    grid = (triton.cdiv(len(out), tiles.COMBINE),)
    combine_kernel[grid](parts[0], parts[1], out, len(out), parts.shape[1], BLOCK=tiles.COMBINE)
    return out


def _flash(p: Problem, side: str, need_dots: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of one side, "q" or "k", and sum_ij G_ij <q_i, k_j> where needed."""
    q_side, k_side = (p.q, p.q_ids, p.g_rows, p.rows), (p.k, p.k_ids, p.g_columns, p.columns)
    x_side, y_side = (q_side, k_side) if side == "q" else (k_side, q_side)
    (x, x_ids, *x_sums), (y, y_ids, *y_sums) = x_side, y_side
    (N, D), M = x.shape, y.shape[0]
    tile = tiles.pick("flash", x, N, M)
    dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
    dots = float32(x, N) if need_dots else None
    flash_kernel[(triton.cdiv(N, tile.n),)](
        x, y, p.scale, x_ids, y_ids, *x_sums, *y_sums, p.unit, dx, dots,
        N, M, x.stride(0), y.stride(0), **tiles.constants("flash", D, tiles.kind_of(x.dtype), tile),
    )  # fmt: skip
    return dx, None if dots is None else dots.sum(dtype=torch.float64)


def _chunked(
    p: Problem, need_q: bool, need_k: bool, need_dots: bool, most: int, library: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and sum_ij G_ij <q_i, k_j>, by way of chunks of G of at most `most` bytes."""
    dq = torch.empty_like(p.q, memory_format=torch.contiguous_format) if need_q else None
    dk = torch.empty_like(p.k, memory_format=torch.contiguous_format) if need_k else None
    factor = p.scale if p.unit is None else p.scale / p.unit
    total = chunks.gradients(
        lambda rows, columns, g: _gradient(p.part(rows, columns), g, None),
        *(p.q, p.k, dq, dk, factor, need_dots, most, library),
    )
    return dq, dk, total if total is None or p.unit is None else total / p.unit


def _dots(p: Problem) -> Tensor:
    """sum_ij G_ij <q_i, k_j> alone: no product but that of the scores, and G is not stored."""
    N, M, _ = p.sizes
    tile = tiles.pick("gradient", p.q, N, M, True)
    dots = float32(p.q, triton.cdiv(N, tile.n) * triton.cdiv(M, tile.m))
    _gradient(p, None, dots)
    total = dots.sum(dtype=torch.float64)
    return total if p.unit is None else total / p.unit


def _gradient(p: Problem, g: Tensor | None, dots: Tensor | None) -> None:
    N, M, D = p.sizes
    # to sum takes as many registers as a mask
    tile = tiles.pick("gradient", p.q, N, M, p.mask is not None or dots is not None)
    gradient_kernel[(triton.cdiv(N, tile.n) * triton.cdiv(M, tile.m),)](
        *p, g, dots, N, M, *p.strides, 0 if g is None else g.stride(0),
        **tiles.constants("gradient", D, tiles.kind_of(p.q.dtype), tile),
    )  # fmt: skip
