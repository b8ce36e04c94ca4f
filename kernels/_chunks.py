"""Gradients by way of chunks of G = dL/d<q_i, k_j>.

A chunk goes to a workspace of bounded size, and two ordinary products take it from there. Every sum
has one owner and one order. Nothing here waits for a card.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from mmfast.kernels import _tiles as tiles
from mmfast.kernels._pairwise_lse_backward import product_kernel
from mmfast.kernels._tile import INTERPRETED, float32

# the most that a chunk of G may take; larger chunks touch the sums less often
WORKSPACE_BYTES = 256 << 20
# False: Triton multiplies the chunks too, in an order that depends on the tile alone. A library's
# order may differ between cards and versions.
LIBRARY_PRODUCTS = not INTERPRETED


def gradients(
    write: Callable[[slice, slice, Tensor | None], None],
    q: Tensor,
    k: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    factor: Tensor,
    need_dots: bool,
    most: int,
    library: bool,
) -> Tensor | None:
    """Fill dq = factor G k and dk = factor G^T q; return sum_ij G_ij <q_i, k_j> (float64), or None.

    Args:
        write: given rows and columns of G, makes them in the chunk it is handed, in the type of q.
            A chunk has memory for whole tiles, to be 0 beyond [N, M]. None where neither dq nor
            dk is there: `write` then only visits.
        q, k: [N, D] and [M, D] with rows of neighbouring elements.
        dq, dk: contiguous, in the type of q or float32; or None.
        need_dots: only beside dq or dk, from whose sums it is free.
        most: bytes of a chunk.
        library: whether a library multiplies, or Triton.
    """
    N, M = q.shape[0], k.shape[0]
    R, C = tiles.chunk(N, M, most // q.element_size())
    # whole tiles, for kernels that load and store without masks
    sides = (-(-size // tiles.LARGEST) * tiles.LARGEST for size in (R, C))
    workspace = None
    if dq is not None or dk is not None:
        workspace = torch.empty(tuple(sides), dtype=q.dtype, device=q.device)
    q_sum, k_sum = _sum_of(dq, R), _sum_of(dk, M)
    dots: list[Tensor] = []
    for i in range(0, N, R):
        rows = slice(i, min(i + R, N))
        sum_i = None if q_sum is None else (q_sum[rows] if q_sum is dq else q_sum[: N - i])
        for j in range(0, M, C):
            columns = slice(j, min(j + C, M))
            g = None if workspace is None else workspace[: rows.stop - i, : columns.stop - j]
            write(rows, columns, g)
            if g is not None and sum_i is not None:
                _add_product(sum_i, g, k[columns], j == 0, library)
            if g is not None and k_sum is not None:
                _add_product(k_sum[columns], g.T, q[rows], i == 0, library)
        if dq is not None and sum_i is not None:
            dots += [_inner(q[rows], sum_i)] if need_dots else []
            torch.mul(sum_i, factor, out=dq[rows])
    if dk is not None and k_sum is not None:
        for j in range(0, M, R) if need_dots and dq is None else ():
            dots.append(_inner(k[j : j + R], k_sum[j : j + R]))
        torch.mul(k_sum, factor, out=dk)
    return torch.stack(dots).sum() if dots else None


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool, library: bool) -> None:
    """out (+)= a b in float32; `fresh`: what `out` holds does not count."""
    if library and a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
        return
    if library and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=0 if fresh else 1, out=out)
        return
    (N, K), D = a.shape, b.shape[1]
    tile = tiles.pick("product", a, N, D)
    product_kernel[(triton.cdiv(N, tile.n) * triton.cdiv(D, tile.m),)](
        a, b, out, N, K, *a.stride(), b.stride(0), out.stride(0), FRESH=fresh,
        **tiles.constants("product", D, tiles.kind_of(a.dtype), tile),
    )  # fmt: skip


def _sum_of(gradient: Tensor | None, rows: int) -> Tensor | None:
    """Where a gradient is summed: in itself if it is float32, otherwise `rows` rows of float32."""
    if gradient is None or gradient.dtype == torch.float32:
        return gradient
    return float32(gradient, rows, gradient.shape[1])


def _inner(x: Tensor, gradient: Tensor) -> Tensor:
    return (x * gradient).sum(dtype=torch.float64)
