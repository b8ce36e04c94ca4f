"""Sparsemax: the point of the probability simplex that is nearest to a row of scores.

    p_i = max(x_i - tau, 0)     tau the one number with sum_i p_i = 1

The support is where p is not 0. With S the support of a row, for an upstream gradient g,

    tau = (sum_S x - 1) / |S|     dx_i = g_i - mean_S(g) on S, 0 elsewhere

An entry that stands exactly at tau is not in the support. Source: Martins and Astudillo, From
Softmax to Sparsemax, ICML 2016 (arXiv 1602.02068), proposition 1 and the Jacobian of section 2.5.
Code that leaves the gradient to autograd through max(x - tau, 0), as that of Chen et al. (Finite
Discrete Tokens, CVPR 2023, arXiv 2303.14865) does, gives an entry at tau half of one.

`reference` finds the support by sorting, algorithm 1 of the paper. The kernels take Newton's
steps on sum_i max(x_i - tau, 0) - 1: it is convex and made of straight pieces, so that steps from
the left, tau = max - 1, rise to the root, each drops entries for good, and the last one is exact
(Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex,
JOTA 1986).
"""

from typing import Any

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import SCORE_TYPE, check_tensor, dense, type_name


def reference(x: Tensor) -> Tensor:
    """The definition in plain torch for the last axis of x: any order of derivative."""
    z = x.double()
    top = z.detach().amax(-1, keepdim=True)
    # a row that is masked whole stays at -inf, where nothing is above the threshold
    top = torch.where(top == -torch.inf, 0.0, top)
    z = z - top
    # NaN where the row holds one, or +inf
    wrong = top - top
    # a NaN is not below anything: rows of NaN are NaN throughout
    support = ~(z <= _threshold(z.detach()))
    count = support.sum(-1, keepdim=True).clamp(min=1) + wrong
    tau = (torch.where(support, z, 0.0).sum(-1, keepdim=True) - 1) / count
    p = z - tau
    # a weight of the support is never rounded to 0
    least = _least(x.dtype)
    lift = (least - p.detach()).clamp(min=0)
    return torch.where(support, p + lift, 0.0).to(x.dtype)


def _threshold(z: Tensor) -> Tensor:
    """tau by sorting: the support has k entries, the most for which 1 + k z_(k) > sum_j z_(j)."""
    down = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    sums = down.cumsum(-1) - 1
    size = (k * down > sums).sum(-1, keepdim=True).clamp(min=1)
    return sums.gather(-1, size - 1) / size


def _least(dtype: torch.dtype) -> float:
    """The smallest positive number of that type."""
    limits = torch.finfo(dtype)
    return float(limits.smallest_normal) * float(limits.eps)


def _cpp_forward(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        _dispatch.core.sparsemax_forward(dense(x), out, torch.get_num_threads())
    return out


def _cpp_backward(g: Tensor, p: Tensor) -> Tensor:
    dx = torch.empty(p.shape, dtype=p.dtype)
    if p.numel():
        _dispatch.core.sparsemax_backward(dense(g), dense(p), dx, torch.get_num_threads())
    return dx


def _cuda_forward(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        # torch exports arrays of the current card only
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            _dispatch.core.sparsemax_cuda_forward(dense(x), out, stream)
    return out


def _cuda_backward(g: Tensor, p: Tensor) -> Tensor:
    dx = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    if p.numel():
        with torch.cuda.device(p.device):
            stream = torch.cuda.current_stream().cuda_stream
            _dispatch.core.sparsemax_cuda_backward(dense(g), dense(p), dx, stream)
    return dx


def _fake_forward(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(g: Tensor, p: Tensor, backend: str) -> Tensor:
    return p.new_empty(p.shape)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend("cuda", ("cuda",), _dispatch.cuda_missing, _dispatch.CUDA_EVIDENCE),
    _dispatch.EAGER,
)

_forward = _dispatch.define(
    "sparsemax_fwd(Tensor x, str backend) -> Tensor",
    _fake_forward,
    {"cpp": _cpp_forward, "cuda": _cuda_forward},
)
_backward = _dispatch.define(
    "sparsemax_bwd(Tensor g, Tensor p, str backend) -> Tensor",
    _fake_backward,
    {"cpp": _cpp_backward, "cuda": _cuda_backward},
)

_gradient = _dispatch.once("sparsemax", _backward)


class _Sparsemax(torch.autograd.Function):
    """For transforms (torch.func, torch.compile), which ask for forward without a context."""

    @staticmethod
    def forward(x: Tensor, backend: str) -> Any:
        return _forward(x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = inputs[-1]
        # the gradient hangs on the support alone, and callers keep the weights anyway
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return _gradient(g, p, ctx.backend), None


_EagerSparsemax = _dispatch.without_binding(_Sparsemax)


def _check(x: Tensor, dim: int) -> None:
    check_tensor("sparsemax", "x", x)
    if x.dtype not in SCORE_TYPE:
        raise TypeError(
            f"sparsemax: x must be float32, float64, bfloat16 or float16, got {type_name(x.dtype)}"
        )
    if x.dim() == 0:
        raise ValueError("sparsemax: x must have at least one dimension, got a scalar")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"sparsemax: dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"sparsemax: dim must be in [{-x.dim()}, {x.dim() - 1}] for x {list(x.shape)}, "
            f"got {dim}"
        )
    if x.shape[dim] == 0:
        raise ValueError(f"sparsemax: x must not be empty along dim {dim}, got {list(x.shape)}")


def sparsemax(x: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """Weights that sum to one along `dim`, most of them exactly 0 where scores differ by much.

    p = max(x - tau, 0) with tau such that the sum is 1: the Euclidean projection of the scores onto
    the probability simplex.

    Args:
        x: float32, float64, bfloat16 or float16 of any shape but a scalar; any strides.
        dim: the dimension along which weights sum to one; other dimensions may be empty.
        backend: "cpp", "cuda", "eager", or None for the first that can run.

    Returns:
        The shape and the type of x; each weight is rounded once. The support is that of sorting the
        same values in float64: an entry exactly at tau has weight 0 and gradient 0, equal entries
        have equal weights, and a weight of the support is never rounded to 0 (in float16 it is at
        least 6e-8). So `p > 0` is the support, and the gradient on it is exact.
        An entry of -inf has weight 0. A row of nothing but -inf has weights and gradients of 0, and
        sums to 0. A row with NaN or +inf is NaN throughout, as softmax has it, and so is its
        gradient; other rows do not notice. Autocast changes nothing.

    Raises:
        TypeError: x is no tensor or not of a floating type above, `dim` is no int.
        ValueError: a scalar, `dim` out of range, no entry along `dim`, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: differentiated twice through a compiled backend, or a transform of
            torch.func around one inside torch.compile.
    """
    _check(x, dim)
    name = _dispatch.choose("sparsemax", backend, BACKENDS, x)
    rows = x.movedim(dim, -1)
    if name == "eager":
        # autocast must not touch the arithmetic of the definition
        with torch.autocast(x.device.type, enabled=False):
            return reference(rows).movedim(-1, dim)
    apply: Any = (_Sparsemax if _dispatch.transformed("sparsemax") else _EagerSparsemax).apply
    weights: Tensor = apply(rows.flatten(0, -2) if x.dim() > 1 else rows[None], name)
    return weights.view(rows.shape).movedim(-1, dim)
