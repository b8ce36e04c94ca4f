"""One block of a problem that several processes share: what each op does to it, by any backend.

q [N, D], k [M, D] and their ids are those of the block; `backend` has been chosen. Nothing here is
differentiated, and the inputs are as autocast left them.
"""

import torch
from torch import Tensor

from mmfast.ops import pairwise_lse as lse
from mmfast.ops import pairwise_softplus as softplus


def lse_of_block(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor,
    k_ids: Tensor,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """rows [N] and columns [M] of this block alone; [0] of columns that are not wanted."""
    if backend != "eager":
        found: tuple[Tensor, Tensor] = lse._forward(
            q, k, scale, q_ids, k_ids, None, columns, backend
        )
        return found
    with torch.autocast(q.device.type, enabled=False):
        made = lse.reference(q, k, scale, q_ids=q_ids, k_ids=k_ids, columns=columns)
    return made if isinstance(made, tuple) else (made, made.new_empty(0))


def lse_gradients_of_block(
    g_rows: Tensor,
    g_columns: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor,
    k_ids: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale) of this block, where rows and columns are sums over all blocks.

    What `needs` does not ask for is empty, or is there all the same.
    """
    if backend != "eager":
        sums = rows.new_empty(0) if columns is None else columns
        made: tuple[Tensor, Tensor, Tensor] = lse._backward(
            g_rows, g_columns, q, k, scale, q_ids, k_ids, None, rows, sums, *needs, backend
        )
        return made
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(rows.dtype), k.to(rows.dtype)
        products = q @ k.T
        s = scale * products
        g = g_rows[:, None] * (s - rows[:, None]).exp()
        if g_columns is not None and columns is not None:
            g = g + g_columns * (s - columns).exp()
        g = g.masked_fill(q_ids[:, None] == k_ids, 0.0)
        return scale * g @ k, scale * g.T @ q, (g * products).sum(dtype=torch.float64)


def softplus_of_block(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    q_ids: Tensor,
    k_ids: Tensor,
    needs: tuple[bool, ...],
    backend: str,
) -> tuple[Tensor, ...]:
    """The sum over this block, dq, dk, dscale and dbias."""
    if backend != "eager":
        made: tuple[Tensor, ...] = softplus._forward(
            q, k, scale, bias, q_ids, k_ids, *needs, backend
        )
        return made
    if not any(needs):
        with torch.autocast(q.device.type, enabled=False):
            total = softplus.reference(q, k, scale, bias, q_ids=q_ids, k_ids=k_ids)
        return total, *(q.new_empty(0) for _ in needs)
    leaves = [x.detach().requires_grad_() for x in (q, k, scale, bias)]
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        total = softplus.reference(*leaves, q_ids=q_ids, k_ids=k_ids)
        return total.detach(), *torch.autograd.grad(total, leaves)
