"""The sum of softplus over all scaled and shifted similarities, without the matrix of them.

    l_ij = scale * <q_i, k_j> + bias
    sum  = sum_ij log(1 + exp(l_ij))      over the pairs (i, j) that are not left out

A pair is left out where its ids are equal. With G_ij = 1 / (1 + exp(-l_ij)),

    dq = scale * G k        dk = scale * G^T q        dscale = sum_ij G_ij <q_i, k_j>
    dbias = sum_ij G_ij

The result is one number, so its gradients are known up to a factor before its own upstream
gradient is. They are made in the same visit of the scores (3 products, where forward and backward
on their own would take 4), and the backward pass multiplies.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_scale,
    cast_as_matmul,
    check_ids,
    check_pair,
    check_tensor,
    dense,
)


def reference(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
) -> Tensor:
    """The definition in plain torch: any device, any order of derivative, [N, M] memory."""
    dtype = SCORE_TYPE[q.dtype]
    logits = scale * (q.to(dtype) @ k.to(dtype).T) + bias
    if q_ids is not None and k_ids is not None:
        logits = logits.masked_fill(q_ids[:, None] == k_ids, -math.inf)
    # softplus(x) = -logsigmoid(-x): this form has no threshold beyond which it is cut off
    return -F.logsigmoid(-logits).sum(dtype=torch.float64).to(dtype)


def _outputs(
    q: Tensor, k: Tensor, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # as wide as they are summed: float16 may not hold them before their upstream gradient comes
    dtype = SCORE_TYPE[q.dtype]
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty(q.shape if need_q else (0,), dtype=dtype),
        k.new_empty(k.shape if need_k else (0,), dtype=dtype),
        q.new_empty(() if need_scale else (0,), dtype=torch.float64),
        q.new_empty(() if need_bias else (0,), dtype=torch.float64),
    )


def _cpp(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_q, need_k, need_scale, need_bias = needs
    total, dq, dk, dscale, dbias = _outputs(q, k, *needs)
    numbers = _dispatch.core.pairwise_softplus(
        dense(q),
        dense(k),
        scale.item(),
        bias.item(),
        None if q_ids is None else q_ids.contiguous(),
        None if k_ids is None else k_ids.contiguous(),
        dq if need_q else None,
        dk if need_k else None,
        need_scale,
        need_bias,
        torch.get_num_threads(),
    )
    for out, number in zip((total, dscale, dbias), numbers, strict=True):
        out.fill_(number)
    return total, dq, dk, dscale, dbias


def _triton(*inputs: Any) -> tuple[Tensor, ...]:
    q, k, *_ = inputs
    total, *gradients = _dispatch.kernels("pairwise_softplus").forward(*inputs)
    _, *empty = _outputs(q, k, False, False, False, False)
    return total, *(x if made is None else made for x, made in zip(empty, gradients, strict=True))


def _fake(
    q: Tensor, k: Tensor, scale: Any, bias: Any, q_ids: Any, k_ids: Any, *needs_and_backend: Any
) -> tuple[Tensor, ...]:
    return _outputs(q, k, *needs_and_backend[:-1])


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_forward = _dispatch.define(
    "pairwise_softplus_fwd(Tensor q, Tensor k, Tensor scale, Tensor bias, Tensor? q_ids, "
    "Tensor? k_ids, bool need_q, bool need_k, bool need_scale, bool need_bias, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    {"cpp": _cpp, "triton": _triton},
)


def _times(g: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """`g` times each gradient, in the types of the inputs; what was not asked for stays empty."""
    *tensors, _backend = others
    inputs, gradients = tensors[:4], tensors[4:]
    # a scale on the CPU beside inputs on a card: here, and only here, the call waits for the card
    return tuple((g * d).to(x) for x, d in zip(inputs, gradients, strict=True))


_gradients = _dispatch.once("pairwise_softplus", _times)


class _PairwiseSoftplus(torch.autograd.Function):
    """For transforms (torch.func, torch.compile), which ask for forward without a context."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        bias: Tensor,
        q_ids: Tensor | None,
        k_ids: Tensor | None,
        need_q: bool,
        need_k: bool,
        need_scale: bool,
        need_bias: bool,
        backend: str,
    ) -> Any:
        # dynamo counts these names where no input asks for a gradient
        needs = (need_q, need_k, need_scale, need_bias)
        return _forward(q, k, scale, bias, q_ids, k_ids, *needs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ctx.backend = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        # the inputs for their types, and so that a second derivative is refused and not wrong
        ctx.save_for_backward(*inputs[:4], *gradients)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        made = _gradients(g, *ctx.saved_tensors, ctx.backend)
        needs = ctx.needs_input_grad[:4]
        return *(x if need else None for x, need in zip(made, needs, strict=True)), *(None,) * 7


_EagerPairwiseSoftplus = _dispatch.without_binding(_PairwiseSoftplus)


def pairwise_softplus(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum of `softplus(scale * q @ k.T + bias)` in O((N + M) * D) memory.

    Args:
        q: [N, D] float32, float64, bfloat16 or float16; any row stride, rows need not be unit.
        k: [M, D] of the same type and device.
        scale, bias: each a number, or a floating tensor of one element (its gradient has its
            shape). They are never read back from a GPU.
        q_ids, k_ids: int64 [N] and [M], both or neither; a pair with equal ids is left out.
        backend: "cpp", "triton", "eager", or None for the first that can run. "triton" takes a
            workspace for gradients, at most mmfast.kernels.pairwise_softplus.WORKSPACE_BYTES.

    Returns:
        A scalar, float64 for float64 inputs and float32 for the others; sums over pairs are kept
        in float64. It is 0 where every pair is left out.
        Gradients flow to q, k, scale and bias. Those asked for are made with the value and kept
        for the backward pass, in the type of the result. Under autocast q and k are cast as a
        matmul would cast them.
        Values inside tensors are not checked: a NaN makes the sum NaN, and a score of +inf makes
        it infinite, unless the pair is left out.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of q and k.
        ValueError: a wrong shape, device or Python number, an empty side, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: differentiated twice through a compiled backend, or a transform of
            torch.func around one inside torch.compile.
    """
    check_tensor("pairwise_softplus", "q", q)
    check_tensor("pairwise_softplus", "k", k)
    q, k = cast_as_matmul(q, k)
    check_pair("pairwise_softplus", q, k)
    check_ids("pairwise_softplus", q, k, q_ids, k_ids)
    scale = as_scale("pairwise_softplus", q, scale)
    bias = as_scale("pairwise_softplus", q, bias, "bias")
    name = _dispatch.choose("pairwise_softplus", backend, BACKENDS, q, k)
    if name == "eager":
        # the cast is done: autocast must not touch the float32 product of the definition
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, scale, bias, q_ids=q_ids, k_ids=k_ids)
    if torch.compiler.is_compiling():
        # dynamo refuses a Function that is given one tensor twice
        k = k.view_as(k) if k is q else k
        k_ids = k_ids.view_as(k_ids) if k_ids is not None and k_ids is q_ids else k_ids
        bias = bias.view_as(bias) if bias is scale else bias
    transformed = _dispatch.transformed("pairwise_softplus")
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (q, k, scale, bias)]
    if transformed or any(needs) or forward_ad._current_level >= 0:
        apply: Any = (_PairwiseSoftplus if transformed else _EagerPairwiseSoftplus).apply
    else:
        apply = _forward  # nobody differentiates
    total: Tensor = apply(q, k, scale, bias, q_ids, k_ids, *needs, name)[0]
    return total
