"""Log-sum-exp of all scaled similarities, by rows and by columns, without the matrix of them.

    s_ij = scale * <q_i, k_j>
    rows[i]    = log sum_j exp(s_ij)        over the pairs (i, j) that are not left out
    columns[j] = log sum_i exp(s_ij)

A pair is left out where its ids are equal or its mask is False. With upstream gradients g of the
rows and h of the columns, and G_ij = g_i exp(s_ij - rows_i) + h_j exp(s_ij - columns_j),

    dq = scale * G k        dk = scale * G^T q        dscale = sum_ij G_ij <q_i, k_j>

so the backward pass needs q, k and the two vectors, and visits the scores once more. Where k is a
constant and only rows are asked for, the mean of k under the softmax of each row is all of it:

    dq = scale * g_i mean_i     dscale = sum_i g_i <q_i, mean_i>     mean_i = sum_j p_ij k_j

"cpp" makes it in the forward pass, two products in all where "triton" takes three.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_scale,
    cast_as_matmul,
    check_ids,
    check_mask,
    check_pair,
    check_tensor,
    dense,
)


def reference(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch: any device, any order of derivative, [N, M] memory."""
    dtype = SCORE_TYPE[q.dtype]
    s = scale * (q.to(dtype) @ k.to(dtype).T)
    keep = mask
    if q_ids is not None and k_ids is not None:
        differs = q_ids[:, None] != k_ids
        keep = differs if keep is None else keep & differs
    rows = _lse(s, keep, dim=1)
    return (rows, _lse(s, keep, dim=0)) if columns else rows


def _lse(s: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    if keep is None:
        return s.logsumexp(dim)
    # an empty row sums zeros and is -inf afterwards: -inf - -inf is NaN in its derivatives
    empty = ~keep.any(dim, keepdim=True)
    s = s.masked_fill(~keep, -math.inf).masked_fill(empty, 0.0)
    return s.logsumexp(dim).masked_fill(empty.squeeze(dim), -math.inf)


def _cpp_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    dtype = SCORE_TYPE[q.dtype]
    out_rows = torch.empty(q.shape[0], dtype=dtype)
    out_columns = torch.empty(k.shape[0] if columns else 0, dtype=dtype)
    _dispatch.core.pairwise_lse_forward(
        dense(q),
        dense(k),
        scale.item(),
        None if q_ids is None else q_ids.contiguous(),
        None if k_ids is None else k_ids.contiguous(),
        mask,
        out_rows,
        out_columns if columns else None,
        torch.get_num_threads(),
    )
    return out_rows, out_columns


def _cpp_backward(
    g_rows: Tensor | None,
    g_columns: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty(q.shape if need_q else (0,), dtype=q.dtype)
    dk = torch.empty(k.shape if need_k else (0,), dtype=k.dtype)
    dscale = _dispatch.core.pairwise_lse_backward(
        None if g_rows is None else g_rows.detach().contiguous(),
        None if g_columns is None else g_columns.detach().contiguous(),
        dense(q),
        dense(k),
        scale.item(),
        None if q_ids is None else q_ids.contiguous(),
        None if k_ids is None else k_ids.contiguous(),
        mask,
        None if g_rows is None else rows.detach(),
        None if g_columns is None else columns.detach(),
        dq if need_q else None,
        dk if need_k else None,
        need_scale,
        torch.get_num_threads(),
    )
    if need_scale:
        return dq, dk, torch.tensor(dscale, dtype=scale.dtype)
    return dq, dk, torch.empty(0, dtype=scale.dtype)


def _cpp_mean(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = SCORE_TYPE[q.dtype]
    rows = torch.empty(q.shape[0], dtype=dtype)
    mean = torch.empty(q.shape, dtype=dtype)
    _dispatch.core.pairwise_lse_mean(
        dense(q),
        dense(k),
        scale.item(),
        None if q_ids is None else q_ids.contiguous(),
        None if k_ids is None else k_ids.contiguous(),
        mask,
        rows,
        mean,
        torch.get_num_threads(),
    )
    return rows, mean


def _fake_forward(
    q: Tensor, k: Tensor, scale: Tensor, q_ids: Any, k_ids: Any, mask: Any, columns: bool, _: str
) -> tuple[Tensor, Tensor]:
    dtype = SCORE_TYPE[q.dtype]
    return (
        q.new_empty(q.shape[0], dtype=dtype),
        q.new_empty(k.shape[0] if columns else 0, dtype=dtype),
    )


def _fake_backward(
    g_rows: Any, g_columns: Any, q: Tensor, k: Tensor, scale: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_q, need_k, need_scale, _backend = others
    return (
        q.new_empty(q.shape if need_q else (0,)),
        k.new_empty(k.shape if need_k else (0,)),
        scale.new_empty(() if need_scale else (0,)),
    )


def _fake_mean(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = SCORE_TYPE[q.dtype]
    return q.new_empty(q.shape[0], dtype=dtype), q.new_empty(q.shape, dtype=dtype)


def _triton_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    rows, columns = _dispatch.kernels("pairwise_lse").forward(*inputs)
    return rows, rows.new_empty(0) if columns is None else columns


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _dispatch.kernels("pairwise_lse").backward(*inputs)
    dq, dk, dscale = (
        x.new_empty(0) if gradient is None else gradient
        for x, gradient in zip(inputs[2:5], gradients, strict=True)
    )
    return dq, dk, dscale


def _triton_mean(q: Tensor, k: Tensor, scale: Tensor, *left_out: Any) -> tuple[Tensor, Tensor]:
    rows, none = _triton_forward(q, k, scale, *left_out, False)
    ones, needs = torch.ones_like(rows), (True, False, False)
    dq, _, _ = _triton_backward(ones, None, q, k, scale, *left_out, rows, none, *needs)
    return rows, dq.to(rows.dtype) / scale


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_forward = _dispatch.define(
    "pairwise_lse_fwd(Tensor q, Tensor k, Tensor scale, Tensor? q_ids, Tensor? k_ids, "
    "Tensor? mask, bool columns, str backend) -> (Tensor, Tensor)",
    _fake_forward,
    {"cpp": _cpp_forward, "triton": _triton_forward},
)
_backward = _dispatch.define(
    "pairwise_lse_bwd(Tensor? g_rows, Tensor? g_columns, Tensor q, Tensor k, Tensor scale, "
    "Tensor? q_ids, Tensor? k_ids, Tensor? mask, Tensor rows, Tensor columns, bool need_q, "
    "bool need_k, bool need_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    {"cpp": _cpp_backward, "triton": _triton_backward},
)


_mean = _dispatch.define(
    "pairwise_lse_mean(Tensor q, Tensor k, Tensor scale, Tensor? q_ids, Tensor? k_ids, "
    "Tensor? mask, str backend) -> (Tensor, Tensor)",
    _fake_mean,
    {"cpp": _cpp_mean, "triton": _triton_mean},
)


def _gradients_of_mean(
    g: Tensor, q: Tensor, scale: Tensor, mean: Tensor, need_q: bool, need_scale: bool, _: str
) -> tuple[Tensor | None, Tensor | None]:
    g = g.unsqueeze(1)
    dq = (scale * g * mean).to(q.dtype) if need_q else None
    dscale = (g * q * mean).sum(dtype=torch.float64).to(scale.dtype) if need_scale else None
    return dq, dscale


_gradients = _dispatch.once("pairwise_lse", _backward)
_gradients_by_mean = _dispatch.once("pairwise_lse", _gradients_of_mean)


class _PairwiseLSE(torch.autograd.Function):
    """For transforms (torch.func, torch.compile), which ask for forward without a context."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        q_ids: Tensor | None,
        k_ids: Tensor | None,
        mask: Tensor | None,
        columns: bool,
        backend: str,
    ) -> Any:
        # dynamo counts these names where no input asks for a gradient
        return _forward(q, k, scale, q_ids, k_ids, mask, columns, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _, ctx.backend = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor | None, g_columns: Tensor | None) -> Any:
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        if g_columns is not None and g_columns.numel() == 0:
            g_columns = None  # torch.compile has a gradient for columns that were not asked for
        if g_rows is None and g_columns is None:
            return (None,) * 8
        dq, dk, dscale = _gradients(
            g_rows, g_columns, *ctx.saved_tensors, need_q, need_k, need_scale, ctx.backend
        )
        return (
            dq if need_q else None,
            dk if need_k else None,
            dscale if need_scale else None,
            *(None,) * 5,
        )


_EagerPairwiseLSE = _dispatch.without_binding(_PairwiseLSE)


class _RowsByMean(torch.autograd.Function):
    """Rows alone, of a constant k: forward makes the mean that backward needs in its place."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _mean(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, _, scale, *_, ctx.backend = inputs
        _, mean = output
        ctx.mark_non_differentiable(mean)
        ctx.save_for_backward(q, scale, mean)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        if g is None:
            return (None,) * 7
        need_q, _, need_scale = ctx.needs_input_grad[:3]
        dq, dscale = _gradients_by_mean(g, *ctx.saved_tensors, need_q, need_scale, ctx.backend)
        return dq, None, dscale, *(None,) * 4


@overload
def pairwise_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
    columns: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def pairwise_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
    columns: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def pairwise_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
    columns: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp over `scale * q @ k.T` in O((N + M) * D) memory.

    Args:
        q: [N, D] float32, float64, bfloat16 or float16; any row stride, rows need not be unit.
        k: [M, D] of the same type and device.
        scale: a number, or a floating tensor of one element (its gradient has its shape). It is
            never read back from a GPU.
        q_ids, k_ids: int64 [N] and [M], both or neither; a pair with equal ids is left out.
        mask: bool [N, M]; a pair where it is False is left out.
        columns: also return the sums over the other side, from the same visit of the scores.
        backend: "cpp", "triton", "eager", or None for the first that can run. "triton" takes a
            workspace for gradients, at most mmfast.kernels.pairwise_lse.WORKSPACE_BYTES.

    Returns:
        rows [N], or (rows [N], columns [M]) with `columns=True`; float64 for float64 inputs,
        float32 for the others. A row with every pair left out is -inf and has gradient 0.
        Gradients flow to q, k and scale, and only those asked for are computed; rows alone of a k
        that needs none have "cpp" make them in the forward pass, so evaluate under torch.no_grad.
        Under autocast q and k are cast as a matmul would cast them.
        Values inside tensors are not checked: NaN and infinities reach the rows and columns
        they belong to, and no others.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of q and k.
        ValueError: a wrong shape, device or Python number, an empty side, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: differentiated twice through a compiled backend, or a transform of
            torch.func around one inside torch.compile.
    """
    check_tensor("pairwise_lse", "q", q)
    check_tensor("pairwise_lse", "k", k)
    q, k = cast_as_matmul(q, k)
    check_pair("pairwise_lse", q, k)
    check_ids("pairwise_lse", q, k, q_ids, k_ids)
    check_mask("pairwise_lse", q, k, mask)
    scale = as_scale("pairwise_lse", q, scale)
    name = _dispatch.choose("pairwise_lse", backend, BACKENDS, q, k)
    if name == "eager":
        # the cast is done: autocast must not touch the float32 product of the definition
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, scale, q_ids=q_ids, k_ids=k_ids, mask=mask, columns=columns)
    if torch.compiler.is_compiling():
        # dynamo refuses a Function that is given one tensor twice
        k = k.view_as(k) if k is q else k
        k_ids = k_ids.view_as(k_ids) if k_ids is not None and k_ids is q_ids else k_ids
    transformed = _dispatch.transformed("pairwise_lse")
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or scale.requires_grad)
    # a transform of torch.func may ask for the gradient of a k that does not say so
    constant_k = not k.requires_grad and (not transformed or torch.compiler.is_compiling())
    if learns and constant_k and not columns and name == "cpp":
        by_mean: Any = _RowsByMean.apply
        alone: Tensor = by_mean(q, k, scale, q_ids, k_ids, mask, name)[0]
        return alone
    if transformed or learns or forward_ad._current_level >= 0:
        apply: Any = (_PairwiseLSE if transformed else _EagerPairwiseLSE).apply
    else:
        apply = _forward  # nobody differentiates: another 0.1 ms
    rows, sums = apply(q, k, scale, q_ids, k_ids, mask, columns, name)
    return (rows, sums) if columns else rows


def softmax_mean(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of `pairwise_lse`, and the mean of k under the softmax of each: constants.

    No gradient flows, so that torch.compile traces what `torch.func.grad` of `pairwise_lse` cannot
    there. For losses, which checked the arguments.

    Args:
        q, k, q_ids, k_ids, backend: as in `pairwise_lse`.
        scale: 0-dim.

    Returns:
        rows [N] and mean [N, D], float64 for float64 inputs, else float32; by "triton" the mean is
        rounded to the inputs' type on the way. A row with every pair left out is -inf, its mean 0.
    """
    q, k, scale = q.detach(), k.detach(), scale.detach()
    name = _dispatch.choose("pairwise_lse", backend, BACKENDS, q, k)
    if name != "eager":
        rows, mean = _mean(q, k, scale, q_ids, k_ids, None, name)
        return rows, mean
    wide = k.to(SCORE_TYPE[k.dtype])
    with torch.autocast(q.device.type, enabled=False):
        s = scale * (q.to(wide.dtype) @ wide.T)
        keep = None if q_ids is None or k_ids is None else q_ids[:, None] != k_ids
        rows = _lse(s, keep, dim=1)
        p = (s - rows.unsqueeze(1)).exp()
        return rows, (p if keep is None else p.masked_fill(~keep, 0.0)) @ wide
