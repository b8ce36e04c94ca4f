"""Spherical interpolation of paired rows: points on the great circle through both.

    m_i = k1 a_i + k2 b_i       k1 = sin(lam theta) / sin(theta)
    theta = arccos <a_i, b_i>   k2 = sin((1 - lam) theta) / sin(theta)

lam weighs the first argument: 1 gives a, 0 gives b. With upstream gradient g of m and c = <a, b>,

    g_c = <g, a> dk1/dc + <g, b> dk2/dc
    da = k1 g + g_c b    db = k2 g + g_c a    dlam = <g, a> dk1/dlam + <g, b> dk2/dlam

so each pass reads its rows once. Source: Oh et al., Geodesic Multi-Modal Mixup for Robust
Fine-Tuning, NeurIPS 2023 (arXiv 2203.03897). The formula as published is 0/0 at theta = 0, and NaN
where rounding takes c above 1; here both are the limit, lam a + (1 - lam) b.
"""

from typing import Any

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_number,
    check_alike,
    check_matrix,
    check_tensor,
    dense,
    type_name,
)

# Where (1 - c) / 2 times max(1, lam^2) is below _NEAR, a weight is summed as a series in it. The
# last of _TERMS is then below float64's rounding, and above it no digit of note cancels.
_NEAR, _TERMS = 0.125, 20


def reference(a: Tensor, b: Tensor, lam: float | Tensor) -> Tensor:
    """The definition in plain torch: any device, any order of derivative."""
    dtype = SCORE_TYPE[a.dtype]
    x, y = a.to(dtype), b.to(dtype)
    lam = torch.as_tensor(lam, dtype=dtype, device=a.device).reshape(-1, 1)
    c = _bounded((x * y).sum(1, keepdim=True))
    return (_weight(c, lam) * x + _weight(c, 1 - lam) * y).to(a.dtype)


def _bounded(c: Tensor) -> Tensor:
    # past the bounds c counts as the bound, and its derivative as the one there, not as 0
    inside = c.detach().clamp(torch.finfo(c.dtype).eps - 1, 1)
    return inside + (c - c.detach()).nan_to_num(0.0)


def _weight(c: Tensor, lam: Tensor) -> Tensor:
    """sin(lam theta) / sin(theta) with cos(theta) = c; every derivative exists at c = 1, too."""
    z = (1 - c) / 2
    near = z * lam.square().clamp(min=1) < _NEAR
    # lam F(1 + lam, 1 - lam; 3/2; z), a hypergeometric function; each branch sees safe values only
    z = torch.where(near, z, 0.0)
    term = lam = lam + 0 * c
    series = term
    for n in range(1, _TERMS):
        term = term * z * ((n - lam) * (n + lam) / (n * (n + 0.5)))
        series = series + term
    c = torch.where(near, 0.0, c)
    theta = c.acos()
    # the sine from c itself: that of a rounded angle near pi has lost what 1 + c still knows
    sine = ((1 - c) * (1 + c)).sqrt()
    rest = (1 - lam) * theta
    # sin(theta - rest): 1 at lam = 1 whatever the angle, as the other is 0 at lam = 0
    from_a = rest.cos() - c * rest.sin() / sine
    far = torch.where(lam > 0.5, from_a, (lam * theta).sin() / sine)
    return torch.where(near, series, far)


def _cpp_forward(a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    out = torch.empty(a.shape, dtype=a.dtype)
    _dispatch.core.slerp_forward(dense(a), dense(b), lam.detach(), out, torch.get_num_threads())
    return out


def _cpp_backward(
    g: Tensor, a: Tensor, b: Tensor, lam: Tensor, need_a: bool, need_b: bool, need_lam: bool
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dlam = _outputs(a, b, lam, need_a, need_b, need_lam)
    _dispatch.core.slerp_backward(
        dense(g),
        dense(a),
        dense(b),
        lam.detach(),
        da if need_a else None,
        db if need_b else None,
        dlam if need_lam else None,
        torch.get_num_threads(),
    )
    return da, db, dlam


def _cuda_forward(a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    # torch exports arrays of the current card only
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
        _dispatch.core.slerp_cuda_forward(dense(a), dense(b), lam.detach(), out, stream)
    return out


def _cuda_backward(
    g: Tensor, a: Tensor, b: Tensor, lam: Tensor, need_a: bool, need_b: bool, need_lam: bool
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dlam = _outputs(a, b, lam, need_a, need_b, need_lam)
    with torch.cuda.device(a.device):
        _dispatch.core.slerp_cuda_backward(
            dense(g),
            dense(a),
            dense(b),
            lam.detach(),
            da if need_a else None,
            db if need_b else None,
            dlam if need_lam else None,
            torch.cuda.current_stream().cuda_stream,
        )
    return da, db, dlam


def _triton_forward(a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    out: Tensor = _dispatch.kernels("slerp").forward(a, b, lam)
    return out


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _dispatch.kernels("slerp").backward(*inputs)
    da, db, dlam = (
        x.new_empty(0) if gradient is None else gradient
        for x, gradient in zip(inputs[1:4], gradients, strict=True)
    )
    return da, db, dlam


def _outputs(
    a: Tensor, b: Tensor, lam: Tensor, need_a: bool, need_b: bool, need_lam: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(b.shape if need_b else (0,)),
        lam.new_empty(a.shape[0] if need_lam else 0),
    )


def _fake_forward(a: Tensor, b: Tensor, lam: Tensor, _: str) -> Tensor:
    return a.new_empty(a.shape)


def _fake_backward(g: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs_and_needs, _backend = inputs
    return _outputs(*inputs_and_needs)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend("cuda", ("cuda",), _dispatch.cuda_missing, _dispatch.CUDA_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_forward = _dispatch.define(
    "slerp_fwd(Tensor a, Tensor b, Tensor lam, str backend) -> Tensor",
    _fake_forward,
    {"cpp": _cpp_forward, "cuda": _cuda_forward, "triton": _triton_forward},
)
_backward = _dispatch.define(
    "slerp_bwd(Tensor g, Tensor a, Tensor b, Tensor lam, bool need_a, bool need_b, "
    "bool need_lam, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    {"cpp": _cpp_backward, "cuda": _cuda_backward, "triton": _triton_backward},
)


_gradients = _dispatch.once("slerp", _backward)


class _Slerp(torch.autograd.Function):
    """For transforms (torch.func, torch.compile), which ask for forward without a context."""

    # every argument by name: where nothing asks for a gradient, dynamo counts them to see whether
    # the first is a context
    @staticmethod
    def forward(a: Tensor, b: Tensor, lam: Tensor, backend: str) -> Any:
        return _forward(a, b, lam, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b, lam = ctx.saved_tensors
        need_a, need_b, need_lam = needs = ctx.needs_input_grad[:3]
        da, db, dlam = _gradients(g, a, b, lam, *needs, ctx.backend)
        if need_lam and lam.shape != dlam.shape:
            dlam = dlam.sum(0, keepdim=True)
        return (
            da if need_a else None,
            db if need_b else None,
            dlam if need_lam else None,
            None,
        )


_EagerSlerp = _dispatch.without_binding(_Slerp)


def _check_rows(a: Tensor, b: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        check_tensor("slerp", name, x)
        check_matrix("slerp", name, x, "N, D")
    if b.shape != a.shape:
        raise ValueError(
            f"slerp: b must be [N={a.shape[0]}, D={a.shape[1]}] like a, got {list(b.shape)}"
        )
    check_alike("slerp", "b", b, "a", a)


def _as_lam(a: Tensor, lam: float | Tensor) -> Tensor:
    """`lam` as [N] or [1] in the type of the arithmetic."""
    dtype = SCORE_TYPE[a.dtype]
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise TypeError(f"slerp: lam must be floating point, got {type_name(lam.dtype)}")
        if lam.numel() != 1 and lam.shape != a.shape[:1]:
            raise ValueError(
                f"slerp: lam must have one element or be [N={a.shape[0]}], got {list(lam.shape)}"
            )
        # torch lets a 0-dim CPU tensor meet any device
        if lam.device != a.device and (lam.device.type != "cpu" or lam.numel() != 1):
            raise ValueError(f"slerp: lam must be on {a.device} like a, got {lam.device}")
        return lam.reshape(-1).to(a.device, dtype)
    return torch.full((1,), as_number("slerp", "lam", lam), dtype=dtype, device=a.device)


def slerp(a: Tensor, b: Tensor, lam: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Mix paired rows along the great circle between them: `lam` of a, `1 - lam` of b.

    m = sin(lam theta) / sin(theta) * a + sin((1 - lam) theta) / sin(theta) * b,
    theta = arccos <a, b>, row by row. Rows of length one give rows of length one; others are taken
    as they are, as in the published formula: neither is normalised here.

    Args:
        a: [N, D] float32, float64, bfloat16 or float16; any row stride.
        b: the same shape, type and device.
        lam: the share of a: a number, a floating tensor of one element, or one of shape [N] for a
            share of its own in each row. Values outside [0, 1] go on along the circle. Under
            torch.compile a number is part of the graph: give one that changes as a tensor.
        backend: "cpp", "cuda", "triton", "eager", or None for the first that can run.

    Returns:
        [N, D] in the type of a. The arithmetic is float32 (float64 for float64), so half types are
        rounded once, and autocast changes nothing.
        Gradients flow to a, b (through the angle, too) and lam (in its shape and type), and only
        those asked for are computed.
        Towards theta = 0 values and gradients reach their limits, those of lam a + (1 - lam) b with
        dk1/dc = -lam (1 - lam^2) / 3; an inner product above 1 counts as 1. Towards theta = pi the
        circle is not determined and the weights grow without bound; an inner product below
        -1 + eps counts as that, which keeps them within 1 / sqrt(2 eps): 2e3 in float32, 5e7 in
        float64 (for lam in [0, 1]). Beyond both bounds the gradient is the one at the bound.
        Values inside tensors are not checked: NaN and infinities stay in their row.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of a and b.
        ValueError: a wrong shape, device or Python number, an empty side, an unknown backend.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: differentiated twice through a compiled backend, or a transform of
            torch.func around one inside torch.compile.
    """
    _check_rows(a, b)
    lam = _as_lam(a, lam)
    name = _dispatch.choose("slerp", backend, BACKENDS, a, b)
    if name == "eager":
        # autocast must not touch the float32 arithmetic of the definition
        with torch.autocast(a.device.type, enabled=False):
            return reference(a, b, lam)
    if torch.compiler.is_compiling():
        # dynamo refuses a Function that is given one tensor twice
        b = b.view_as(b) if b is a else b
    apply: Any = (_Slerp if _dispatch.transformed("slerp") else _EagerSlerp).apply
    mixed: Tensor = apply(a, b, lam, name)
    return mixed
