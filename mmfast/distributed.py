"""What a loss over all ranks of a process group is made of, in O(rows * D) memory a rank.

Each rank has rows q and k of its own; k alone travels (`mmfast._ring`), q stays. A rank computes
every block q_r k_s^T once forward and once backward, so all of them together do the work of one
process: losses that gather features do every block twice, or all of them on every rank.

* lse: a block gives terms of the rows at hand, merged here, and of the columns, which follow k
  home. Backward, k travels with its columns' log-sum-exp and their upstream gradient; dq adds up
  here, dk, in float32 or wider, on its way home.
* softplus: the sum's gradients are made forward, as in `pairwise_softplus`; dk follows k home.

**The contract of a loss with group=.** It is called by every rank, with its own rows, and its
backward pass, too. reduction="mean" gives W / N * the sum of the rank's own terms, W ranks and N
rows in all: its own mean where batches are equal. "sum" gives W * that sum, "none" the terms. The
average over ranks is the loss of the whole batch, and so is the average that
DistributedDataParallel makes of gradients that of one process, for every parameter, the scale
included. Random numbers, such as lam of a mixup, must be alike on all ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast._ring import Ring
from mmfast.ops import pairwise_lse as lse
from mmfast.ops import pairwise_softplus as softplus
from mmfast.ops._blocks import lse_gradients_of_block, lse_of_block, softplus_of_block
from mmfast.ops._inputs import SCORE_TYPE


def ring_lse(
    ring: Ring | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    *,
    q_ids: Tensor,
    k_ids: Tensor,
    columns: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`pairwise_lse` of all ranks' q and k: this rank's rows over all k, its columns over all q.

    Args:
        ring: from `join` with k; None is one process.
        q: [N, D] of this rank.
        k: [M, D] of this rank; D, dtype, scale and which inputs learn are alike on all ranks.
        scale: 0-dim.
        q_ids, k_ids: int64 [N] and [M], compared across ranks; equal ids are left out.
        columns: whether those are wanted.
        backend: as in `pairwise_lse`, for each block.

    Returns:
        rows [N] and columns [M], or [0] of them; float64 for float64 inputs, else float32. Of a k
        that needs no gradient rows alone bring theirs along, and nothing travels backward.

    Raises:
        RuntimeError: `backend` cannot run here; a neighbour is gone; differentiated twice.
    """
    if ring is None:
        plain: dict[str, Any] = {"q_ids": q_ids, "k_ids": k_ids, "backend": backend}
        if columns:
            return lse.pairwise_lse(q, k, scale, columns=True, **plain)
        rows = lse.pairwise_lse(q, k, scale, **plain)
        return rows, rows.new_empty(0)
    learns = torch.is_grad_enabled() and (q.requires_grad or scale.requires_grad)
    by_mean = learns and not k.requires_grad and not columns
    name = _dispatch.choose("pairwise_lse", backend, lse.BACKENDS, q, k)
    apply: Any = (_RingRowsByMean if by_mean else _RingLSE).apply
    found: tuple[Tensor, Tensor] = apply(q, k, scale, q_ids, k_ids, ring, columns, name)
    return found


_NO_SECOND = "a loss with group= has no second derivative"


class _RingLSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        q_ids: Tensor,
        k_ids: Tensor,
        ring: Ring,
        columns: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        rows = q.new_full((len(q),), -math.inf, dtype=SCORE_TYPE[q.dtype])

        def visit(_: int, k: Tensor, k_ids: Tensor) -> Tensor | None:
            part, sums = lse_of_block(q, k, scale, q_ids, k_ids, columns, backend)
            _join_sums(rows, part)
            return sums if columns else None

        sums = ring.circulate("forward pass", [k, k_ids], visit, _join_sums)
        sums = rows.new_empty(0) if sums is None else sums
        ctx.save_for_backward(q, k, scale, q_ids, k_ids, rows, sums)
        ctx.rest = ring, columns, backend
        return rows, sums

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_columns: Tensor) -> Any:
        needs = ctx.needs_input_grad[:3]
        made = _lse_gradients(g_rows, g_columns, *ctx.saved_tensors, needs, *ctx.rest)
        return *made, *(None,) * 5


def _join_sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(a, b, out=a)


def _lse_around(
    g_rows: Tensor,
    g_columns: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor,
    k_ids: Tensor,
    rows: Tensor,
    columns: Tensor,
    needs: tuple[bool, bool, bool],
    ring: Ring,
    by_columns: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    dq, dscale = _Sum(rows.dtype), _Sum(torch.float64)

    def visit(_: int, k: Tensor, k_ids: Tensor, *of_columns: Tensor) -> Tensor | None:
        sums, g_sums = of_columns or (None, None)
        of_q, of_k, of_scale = lse_gradients_of_block(
            g_rows, g_sums, q, k, scale, q_ids, k_ids, rows, sums, needs, backend
        )
        dq.add(of_q)
        dscale.add(of_scale)
        return of_k.to(rows.dtype) if needs[1] else None

    of_columns = [columns, g_columns] if by_columns else []
    dk = ring.circulate("backward pass", [k, k_ids, *of_columns], visit)
    return _asked((dq.value, dk, dscale.value), (q, k, scale), needs)


class _Sum:
    """Of what blocks make, added up in place; the first is taken as it comes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.to(self.dtype)
        self.value = x if self.value is None else self.value.add_(x)


def _asked(
    made: Sequence[Tensor | None], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, in the types of their inputs."""
    found = zip(made, inputs, needs, strict=True)
    return tuple(None if x is None or not need else x.to(like) for x, like, need in found)


_lse_gradients = _dispatch.once("pairwise_lse", _lse_around, _NO_SECOND)
_gradients_of_mean = _dispatch.once("pairwise_lse", lse._gradients_of_mean, _NO_SECOND)


class _RingRowsByMean(torch.autograd.Function):
    """Rows alone, of a constant k: dq is made of their mean of k, and nothing travels backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        q_ids: Tensor,
        k_ids: Tensor,
        ring: Ring,
        _: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        rows, mean = ring_softmax_mean(ring, q, k, scale, q_ids=q_ids, k_ids=k_ids, backend=backend)
        ctx.save_for_backward(q, scale, mean)
        ctx.backend = backend
        return rows, rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
        need_q, _, need_scale = ctx.needs_input_grad[:3]
        dq, dscale = _gradients_of_mean(g, *ctx.saved_tensors, need_q, need_scale, ctx.backend)
        return dq, None, dscale, *(None,) * 5


def ring_softmax_mean(
    ring: Ring | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    *,
    q_ids: Tensor,
    k_ids: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax_mean` over the k of all ranks: rows [N] and mean [N, D] of this rank's q."""
    if ring is None:
        return lse.softmax_mean(q, k, scale, q_ids=q_ids, k_ids=k_ids, backend=backend)
    dtype = SCORE_TYPE[q.dtype]
    rows = q.new_full((len(q),), -math.inf, dtype=dtype)
    mean = torch.zeros_like(q, dtype=dtype)

    def visit(_: int, k: Tensor, k_ids: Tensor) -> None:
        part, of_part = lse.softmax_mean(q, k, scale, q_ids=q_ids, k_ids=k_ids, backend=backend)
        total = torch.logaddexp(rows, part)
        # nothing yet and nothing here: both means are 0
        weights = ((x - total).exp().masked_fill(total == -math.inf, 0.0) for x in (rows, part))
        old, new = (x.unsqueeze(1) for x in weights)
        mean.mul_(old).add_(new * of_part)
        rows.copy_(total)

    with torch.no_grad():
        ring.circulate("forward pass", [k.detach(), k_ids], visit)
    return rows, mean


def ring_softplus(
    ring: Ring | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    q_ids: Tensor,
    k_ids: Tensor,
    backend: str | None = None,
) -> Tensor:
    """`pairwise_softplus` of this rank's q against the k of all ranks; arguments as in `ring_lse`.

    dk is made before anybody's upstream gradient is known, so that must be alike on all ranks:
    the backward pass says so where it is not.
    """
    if ring is None:
        return softplus.pairwise_softplus(
            q, k, scale, bias, q_ids=q_ids, k_ids=k_ids, backend=backend
        )
    name = _dispatch.choose("pairwise_softplus", backend, softplus.BACKENDS, q, k)
    needs = tuple(torch.is_grad_enabled() and x.requires_grad for x in (q, k, scale, bias))
    apply: Any = _RingSoftplus.apply
    total: Tensor = apply(q, k, scale, bias, q_ids, k_ids, ring, needs, name)
    return total


class _RingSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        bias: Tensor,
        q_ids: Tensor,
        k_ids: Tensor,
        ring: Ring,
        needs: tuple[bool, ...],
        backend: str,
    ) -> Tensor:
        dtype = SCORE_TYPE[q.dtype]
        total, dscale, dbias = (_Sum(torch.float64) for _ in range(3))
        dq = _Sum(dtype)

        def visit(_: int, k: Tensor, k_ids: Tensor) -> Tensor | None:
            part, of_q, of_k, *numbers = softplus_of_block(
                q, k, scale, bias, q_ids, k_ids, needs, backend
            )
            for whole, new in zip((total, dq, dscale, dbias), (part, of_q, *numbers), strict=True):
                whole.add(new)
            return of_k if needs[1] else None

        dk = ring.circulate("forward pass", [k, k_ids], visit)
        # the inputs for their types, and so that a second derivative is refused and not wrong
        ctx.save_for_backward(q, k, scale, bias, dq.value, dk, dscale.value, dbias.value)
        ctx.rest = needs, ring, backend
        assert total.value is not None
        return total.value.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_softplus_gradients(g, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


def _times(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    dq: Tensor,
    dk: Tensor | None,
    dscale: Tensor,
    dbias: Tensor,
    needs: tuple[bool, ...],
    ring: Ring,
    _: str,
) -> tuple[Tensor | None, ...]:
    if dk is not None:
        ring.check_alike("backward pass", "the upstream gradient", g)
    made = [None if x is None else g * x for x in (dq, dk, dscale, dbias)]
    return _asked(made, (q, k, scale, bias), needs)


_softplus_gradients = _dispatch.once("pairwise_softplus", _times, _NO_SECOND)


def ring_group_sums(ring: Ring, x: Tensor, ids: Tensor) -> Tensor:
    """The sum of all ranks' rows x whose id is that of row i of this rank, [N, D].

    Which rows meet is symmetric, so the gradient is the same sum of upstream gradients.
    """
    apply: Any = _RingGroupSums.apply
    sums: Tensor = apply(x, ids, ring)
    return sums


class _RingGroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, ring: Ring) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.ring = ring
        ordered = ids.sort().values
        sums = x.new_zeros(len(ids) + 1, *x.shape[1:])

        def visit(_: int, x: Tensor, of_x: Tensor) -> None:
            sums.index_add_(0, slots(ordered, of_x), x)

        ring.circulate("sums of equal ids", [x, ids], visit)
        return sums[slots(ordered, ids)]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ring_group_sums(ctx.ring, g, *ctx.saved_tensors), None, None


def slots(ordered: Tensor, ids: Tensor) -> Tensor:
    """Where each of `ids` first stands in `ordered`; len(ordered) for those that do not."""
    place = torch.searchsorted(ordered, ids)
    met = ordered[place.clamp(max=len(ordered) - 1)] == ids
    return torch.where(met, place, len(ordered))


def ring_total(ring: Ring, x: Tensor) -> Tensor:
    """The sum of all ranks' vectors x, with its gradient; the same bits on all ranks."""
    apply: Any = _RingTotal.apply
    total: Tensor = apply(x, ring)
    return total


class _RingTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return torch.cat(ring.each().gather("sum over ranks", x.unsqueeze(0))).sum(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ring_total(ctx.ring, g), None
