"""The largest similarity of every row, where it stands and how many exceed a threshold.

    s_ij = <q_i, k_j>      over the pairs whose ids differ
    largest[i] = max_j s_ij      index[i] = the lowest j that has it
    above[i] = how many s_ij > threshold[i]

in one visit of the scores. Gradients flow to the largest alone:

    dq_i = g_i k_index[i]      dk_j = sum_{i: index[i] = j} g_i q_i
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    cast_as_matmul,
    check_ids,
    check_pair,
    check_tensor,
    dense,
    type_name,
)


def reference(
    q: Tensor,
    k: Tensor,
    threshold: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain torch: any device, any order of derivative, [N, M] memory."""
    dtype = SCORE_TYPE[q.dtype]
    s = q.to(dtype) @ k.to(dtype).T
    out = s.isnan()
    if q_ids is not None and k_ids is not None:
        out = out | (q_ids[:, None] == k_ids)
    s = s.masked_fill(out, -math.inf)
    # amax would share the gradient between equal ones
    largest, index = s.max(1)
    index = torch.where(largest == -math.inf, -1, index)
    if threshold is None:
        return largest, index, torch.zeros_like(index)
    return largest, index, ((s > threshold[:, None]) & ~out).sum(1)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N = q.shape[0]
    return (
        q.new_empty(N, dtype=SCORE_TYPE[q.dtype]),
        q.new_empty(N, dtype=torch.int64),
        q.new_empty(N, dtype=torch.int64),
    )


def _cpp(
    q: Tensor,
    k: Tensor,
    threshold: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    largest, index, above = _outputs(q)
    threshold, q_ids, k_ids = (
        None if x is None else x.contiguous() for x in (threshold, q_ids, k_ids)
    )
    _dispatch.core.pairwise_rank(
        dense(q), dense(k), threshold, q_ids, k_ids, largest, index, above,
        torch.get_num_threads(),
    )  # fmt: skip
    return largest, index, above


def _triton(*inputs: Any) -> Any:
    return _dispatch.kernels("pairwise_rank").rank(*inputs)


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(q)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_rank = _dispatch.define(
    "pairwise_rank(Tensor q, Tensor k, Tensor? threshold, Tensor? q_ids, Tensor? k_ids, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _fake,
    {"cpp": _cpp, "triton": _triton},
)


class _Largest(torch.autograd.Function):
    """`largest` as it is, with the gradient of <q_i, k_index[i]>; 0 where there is no index.

    The backward pass is plain torch, so that any order of derivative is there.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, index: Tensor, largest: Tensor) -> Tensor:
        return largest.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        q, k, index = ctx.saved_tensors
        none = index < 0
        at, g = index.masked_fill(none, 0), g.masked_fill(none, 0)[:, None]
        dq = dk = None
        if ctx.needs_input_grad[0]:
            picked = F.embedding(at, k).to(g.dtype).masked_fill(none[:, None], 0)
            dq = (g * picked).to(q.dtype)
        if ctx.needs_input_grad[1]:
            rows = g * q.to(g.dtype).masked_fill(none[:, None], 0)
            # summed in a fixed order on a card, too, where index_add is not
            dk = torch.ops.aten.embedding_dense_backward(rows, at, len(k), -1, False).to(k.dtype)
        return dq, dk, None, None


def pairwise_rank(
    q: Tensor,
    k: Tensor,
    *,
    threshold: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest score of each row of `q @ k.T`, its column, and how many exceed a threshold.

    In O((N + M) * D) memory.

    Args:
        q: [N, D] float32, float64, bfloat16 or float16; any row stride, rows need not be unit.
        k: [M, D] of the same type and device.
        threshold: [N] of any floating type, compared in the type of the scores. Products of one
            pair made elsewhere may differ from the sweep's in the last place: leave that pair out
            by ids where it must not count. None: nothing is counted.
        q_ids, k_ids: int64 [N] and [M], both or neither; a pair with equal ids is left out.
        backend: "cpp", "triton", "eager", or None for the first that can run.

    Returns:
        largest [N] (float64 for float64 inputs, float32 for the others), index [N] int64, the
        lowest column of equal ones, and above [N] int64, 0 without a threshold.
        A row without a score above -inf has -inf and -1. A NaN is never the largest and never
        counted; nothing exceeds a threshold of NaN.
        Gradients of any order flow to q and k from the largest alone, in a fixed order of
        additions; a row without one has the gradient 0. Under autocast q and k are cast as a
        matmul would cast them.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of q and k.
        ValueError: a wrong shape or device, an empty side, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: a transform of torch.func around a compiled backend inside
            torch.compile.
    """
    check_tensor("pairwise_rank", "q", q)
    check_tensor("pairwise_rank", "k", k)
    q, k = cast_as_matmul(q, k)
    check_pair("pairwise_rank", q, k)
    check_ids("pairwise_rank", q, k, q_ids, k_ids)
    threshold = _checked_threshold(q, threshold)
    name = _dispatch.choose("pairwise_rank", backend, BACKENDS, q, k)
    if name == "eager":
        # the cast is done: autocast must not touch the float32 product of the definition
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, threshold, q_ids, k_ids)
    if _dispatch.transformed("pairwise_rank") and k is q:
        k = k.view_as(k)  # dynamo refuses a Function that is given one tensor twice
    largest, index, above = _rank(q.detach(), k.detach(), threshold, q_ids, k_ids, name)
    apply: Any = _Largest.apply
    return apply(q, k, index, largest), index, above


def _checked_threshold(q: Tensor, threshold: Tensor | None) -> Tensor | None:
    """In the type of the scores, without a graph."""
    if threshold is None:
        return None
    check_tensor("pairwise_rank", "threshold", threshold)
    if not threshold.is_floating_point():
        raise TypeError(
            f"pairwise_rank: threshold must be floating point, got {type_name(threshold.dtype)}"
        )
    if threshold.shape != (len(q),):
        raise ValueError(
            f"pairwise_rank: threshold must be [N={len(q)}], got {list(threshold.shape)}"
        )
    if threshold.device != q.device:
        raise ValueError(
            f"pairwise_rank: threshold must be on {q.device} like q, got {threshold.device}"
        )
    return threshold.detach().to(SCORE_TYPE[q.dtype])
