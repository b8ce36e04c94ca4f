"""Tokens pooled over a codebook: every code takes its best token, a sample the codes it then needs.

    s_bnc     = <token_bn, code_c> / (sqrt(D) temperature)    padded_score at padded places
    z_bc      = max_n s_bnc                                   or mean, or sum
    weights_b = sparsemax(z_b)                                or softmax, or sigmoid
    pooled_b  = sum_c weights_bc code_c                       sigmoid: over sum_c weights_bc

The maximum sends its gradient to the winner alone, the lowest of equal tokens; a padded place has
none. With the upstream gradients g of pooled and h of weights, v_bc = h_bc + <g_b, code_c> and dz
what the normalisation makes of v (sparsemax: v less its mean over the support, 0 elsewhere),

    dtoken_bn = sum_c dz_bc [n wins c] code_c / (sqrt(D) temperature)
    dcode_c   = sum_b dz_bc token_b,winner / (sqrt(D) temperature) + weights_bc g_b
    dtemperature = -sum_bn <dtoken_bn, token_bn> / temperature

so the backward pass needs the winners and weights, [B, C] each, and visits only codes of a weight
that is not 0.

Source: Chen et al., Revisiting Multimodal Representation in Contrastive Learning: From Patch and
Token Embeddings to Finite Discrete Tokens, CVPR 2023 (arXiv 2303.14865); sparsemax of Martins and
Astudillo, ICML 2016. The paper leaves padded tokens out. The published code
(github.com/yuxiaochen1103/FDT) sets their scores to 0, so that they win wherever every token that
is there has a negative score, and count in the mean; `padded_score=0.0` does the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops import sparsemax
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_number,
    as_scale,
    cast_as_matmul,
    check_alike,
    check_matrix,
    check_tensor,
    dense,
    type_name,
)

POOLS = ("max", "mean", "sum")
NORMALIZATIONS = ("sparsemax", "softmax", "sigmoid")


def reference(
    tokens: Tensor,
    codebook: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    pool: str = "max",
    normalize: str = "sparsemax",
    padded_score: float = -math.inf,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch: any device, any order of derivative, [B, N, C] memory."""
    dtype = SCORE_TYPE[tokens.dtype]
    x, codes = tokens.to(dtype), codebook.to(dtype)
    if mask is not None:
        # whatever stands at a padded place, a gradient of 0 must not meet it
        x = x.masked_fill(~mask.unsqueeze(2), 0.0)
    s = x @ codes.T / (math.sqrt(x.shape[2]) * temperature)
    z = _pool_scores(s, mask, pool, padded_score)
    pooled, weights = _look_up(z, codes, _empty(mask, padded_score), normalize)
    return pooled.to(tokens.dtype), weights


def _pool_scores(s: Tensor, mask: Tensor | None, pool: str, padded_score: float) -> Tensor:
    """[B, N, C] -> [B, C]; what is left of a sample without a token does not matter."""
    if mask is None:
        return {"max": lambda: s.max(1).values, "mean": lambda: s.mean(1), "sum": lambda: s.sum(1)}[
            pool
        ]()
    padded = ~mask.unsqueeze(2)
    if pool == "max":
        best = s.masked_fill(padded, -math.inf).max(1).values
        # a padded place loses a tie, and to NaN
        return torch.where(padded.any(1) & (best < padded_score), padded_score, best)
    left_out = padded_score == -math.inf
    total = s.masked_fill(padded, 0.0 if left_out else padded_score).sum(1)
    if pool == "sum":
        return total
    return total / (mask.sum(1, keepdim=True).clamp(min=1) if left_out else s.shape[1])


def _empty(mask: Tensor | None, padded_score: float) -> Tensor | None:
    """bool [B, 1], samples of which nothing is left; None where there is no such thing."""
    if mask is None or padded_score > -math.inf:
        return None
    return ~mask.any(1, keepdim=True)


def _look_up(
    z: Tensor,
    codes: Tensor,
    empty: Tensor | None,
    normalize: str,
    project: Callable[[Tensor], Tensor] = sparsemax.reference,
) -> tuple[Tensor, Tensor]:
    """Scores [B, C] -> what they pool of the codes [C, D], and the weights [B, C]."""
    weights = _normalize(z, empty, normalize, project)
    return weights @ codes / _total(weights, normalize), weights


def _normalize(
    z: Tensor, empty: Tensor | None, normalize: str, project: Callable[[Tensor], Tensor]
) -> Tensor:
    if empty is not None:
        z = z.masked_fill(empty, 0.0)
    if normalize == "sparsemax":
        weights = project(z)
    else:
        weights = z.softmax(1) if normalize == "softmax" else z.sigmoid()
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def _total(weights: Tensor, normalize: str) -> float | Tensor:
    """What pooled is divided by."""
    if normalize != "sigmoid":
        return 1.0
    total = weights.sum(1, keepdim=True)
    return torch.where(total == 0, 1.0, total)


def _pool_first(
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    pool: str,
    normalize: str,
    padded_score: float,
) -> tuple[Tensor, Tensor]:
    """Mean or sum, which may be taken before the product: of the same cost on every backend."""
    codes, (_, N, D) = codebook.to(SCORE_TYPE[tokens.dtype]), tokens.shape
    if mask is None:
        count, there = torch.full((1, 1), N, device=tokens.device), tokens
    else:
        count, there = mask.sum(1, keepdim=True), tokens.masked_fill(~mask.unsqueeze(2), 0.0)
    x = there.sum(1, dtype=codes.dtype)
    shift = torch.zeros_like(count) if padded_score == -math.inf else (N - count) * padded_score
    if pool == "mean":
        places = count.clamp(min=1) if padded_score == -math.inf else N
        x, shift = x / places, shift / places
    z = x @ codes.T / (math.sqrt(D) * temperature) + shift
    pooled, weights = _look_up(z, codes, _empty(mask, padded_score), normalize, sparsemax.sparsemax)
    return pooled.to(tokens.dtype), weights


def _cpp_forward(
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    normalize: str,
    padded_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    pooled, weights, winners = _outputs(tokens, codebook)
    _dispatch.core.fdt_pool_forward(
        _samples(tokens),
        dense(codebook),
        _scale(tokens, temperature).item(),
        mask,
        normalize,
        padded_score,
        pooled,
        weights,
        winners,
        torch.get_num_threads(),
    )
    return pooled, weights, winners


def _cpp_backward(
    g_pooled: Tensor | None,
    g_weights: Tensor | None,
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    weights: Tensor,
    winners: Tensor,
    normalize: str,
    need_tokens: bool,
    need_codebook: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_tokens = torch.empty(tokens.shape if need_tokens else (0,), dtype=tokens.dtype)
    d_codebook = torch.empty(codebook.shape if need_codebook else (0,), dtype=codebook.dtype)
    scale = _scale(tokens, temperature).item()
    d_scale = _dispatch.core.fdt_pool_backward(
        None if g_pooled is None else g_pooled.detach().contiguous(),
        None if g_weights is None else g_weights.detach().contiguous(),
        _samples(tokens),
        dense(codebook),
        scale,
        normalize,
        weights.detach(),
        winners,
        d_tokens.flatten(1) if need_tokens else None,
        d_codebook if need_codebook else None,
        need_temperature,
        torch.get_num_threads(),
    )
    if need_temperature:
        slope = -d_scale * scale / temperature.item()
        return d_tokens, d_codebook, torch.tensor(slope, dtype=temperature.dtype)
    return d_tokens, d_codebook, torch.empty(0, dtype=temperature.dtype)


def _triton_forward(
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    normalize: str,
    padded_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _dispatch.kernels("fdt_pool")
    scale = _scale(tokens, temperature)
    z, winners = kernels.forward(tokens, codebook, scale, mask, padded_score)
    weights = _normalize(z, _empty(mask, padded_score), normalize, sparsemax.sparsemax)
    pooled = kernels.weighted(weights, codebook.detach()) / _total(weights, normalize)
    return pooled.to(tokens.dtype), weights, winners


def _triton_backward(
    g_pooled: Tensor | None,
    g_weights: Tensor | None,
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    weights: Tensor,
    winners: Tensor,
    normalize: str,
    need_tokens: bool,
    need_codebook: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _dispatch.kernels("fdt_pool")
    scale = _scale(tokens, temperature)
    total = _total(weights, normalize)
    v = torch.zeros_like(weights) if g_pooled is None else kernels.dots(g_pooled, codebook.detach())
    if normalize == "sigmoid":
        v = (v - (weights * v).sum(1, keepdim=True) / total) / total
    if g_weights is not None:
        v = v + g_weights
    d_tokens, d_codebook, dots = kernels.backward(
        g_pooled,
        weights / total,
        _slopes(v, weights, normalize),
        tokens,
        codebook,
        scale,
        winners,
        need_tokens,
        need_codebook,
        need_temperature,
    )
    if dots is None:
        d_temperature = temperature.new_empty(0)
    else:
        # where the temperature is on the CPU, its gradient has to come there
        dots = dots.to(temperature.device, temperature.dtype)
        d_temperature = -dots / temperature.detach()
    return (
        tokens.new_empty(0) if d_tokens is None else d_tokens,
        codebook.new_empty(0) if d_codebook is None else d_codebook,
        d_temperature,
    )


def _slopes(v: Tensor, weights: Tensor, normalize: str) -> Tensor:
    """The gradient of the scores from that of the weights, 0 where the weight is."""
    if normalize == "sigmoid":
        return weights * (1 - weights) * v
    if normalize == "softmax":
        return weights * (v - (weights * v).sum(1, keepdim=True))
    there = weights != 0
    v = torch.where(there, v, 0.0)
    return torch.where(there, v - v.sum(1, keepdim=True) / there.sum(1, keepdim=True), 0.0)


def _scale(tokens: Tensor, temperature: Tensor) -> Tensor:
    return 1 / (math.sqrt(tokens.shape[2]) * temperature.detach().double())


def _samples(tokens: Tensor) -> Tensor:
    """[B, N * D]; samples may be any distance apart, as where the class token is left out."""
    return dense(tokens.detach().flatten(1))


def _outputs(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, _, D), C = tokens.shape, codebook.shape[0]
    return (
        tokens.new_empty((B, D)),
        tokens.new_empty((B, C), dtype=SCORE_TYPE[tokens.dtype]),
        tokens.new_empty((B, C), dtype=torch.int32),
    )


def _fake_forward(tokens: Tensor, codebook: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(tokens, codebook)


def _fake_backward(
    g_pooled: Any,
    g_weights: Any,
    tokens: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_tokens, need_codebook, need_temperature, _backend = others
    return (
        tokens.new_empty(tokens.shape if need_tokens else (0,)),
        codebook.new_empty(codebook.shape if need_codebook else (0,)),
        temperature.new_empty(() if need_temperature else (0,)),
    )


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_forward = _dispatch.define(
    "fdt_pool_fwd(Tensor tokens, Tensor codebook, Tensor temperature, Tensor? mask, "
    "str normalize, float padded_score, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
    {"cpp": _cpp_forward, "triton": _triton_forward},
)
_backward = _dispatch.define(
    "fdt_pool_bwd(Tensor? g_pooled, Tensor? g_weights, Tensor tokens, Tensor codebook, "
    "Tensor temperature, Tensor weights, Tensor winners, str normalize, bool need_tokens, "
    "bool need_codebook, bool need_temperature, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    {"cpp": _cpp_backward, "triton": _triton_backward},
)


_gradients = _dispatch.once("fdt_pool", _backward)


class _FDTPool(torch.autograd.Function):
    """For transforms (torch.func, torch.compile), which ask for forward without a context."""

    @staticmethod
    def forward(
        tokens: Tensor,
        codebook: Tensor,
        temperature: Tensor,
        mask: Tensor | None,
        normalize: str,
        padded_score: float,
        backend: str,
    ) -> Any:
        # dynamo counts these names where no input asks for a gradient
        return _forward(tokens, codebook, temperature, mask, normalize, padded_score, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tokens, codebook, temperature, _mask, ctx.normalize, _score, ctx.backend = inputs
        _, weights, winners = output
        ctx.save_for_backward(tokens, codebook, temperature, weights, winners)
        ctx.mark_non_differentiable(winners)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g_pooled: Tensor | None, g_weights: Tensor | None, _: Any) -> Any:
        needs = ctx.needs_input_grad[:3]
        if g_pooled is None and g_weights is None:
            return (None,) * 7
        gradients = _gradients(
            g_pooled, g_weights, *ctx.saved_tensors, ctx.normalize, *needs, ctx.backend
        )
        asked = (x if need else None for x, need in zip(gradients, needs, strict=True))
        return (*asked, *(None,) * 4)


_EagerFDTPool = _dispatch.without_binding(_FDTPool)


def fdt_pool(
    tokens: Tensor,
    codebook: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    pool: str = "max",
    normalize: str = "sparsemax",
    padded_score: float = -math.inf,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What every sample's tokens find in a codebook, in O(B * (N * D + C) + C * D) memory.

    Args:
        tokens: [B, N, D] float32, float64, bfloat16 or float16; any strides.
        codebook: [C, D] of the same type and device; key and value at once.
        temperature: above 0: a number, or a floating tensor of one element (its gradient has its
            shape), which is never read back from a GPU.
        mask: bool [B, N], True where there is a token. Default: everywhere.
        lengths: int64 [B], instead of a mask: the first `lengths[b]` places hold tokens.
        pool: "max", "mean" or "sum" of a code's scores over the tokens of a sample.
        normalize: "sparsemax", "softmax" or "sigmoid", over the codebook.
        padded_score: the score of a padded place, after the temperature. -inf leaves it out of the
            maximum, the mean and the sum; a number stands in for it: it can be the maximum, and
            the mean divides by N. 0.0 is what the published code does.
        backend: "cpp", "triton", "eager", or None for the first that can run.

    Returns:
        pooled [B, D] in the type of tokens, and weights [B, C], float64 for float64 and float32 for
        the others. "sparsemax" and "softmax" weights sum to 1, "sigmoid" weights do not, and pooled
        is divided by their sum (by 1 where all of them are 0).
        A sample without a token is all 0 where padded_score is -inf, and has gradient 0.
        Gradients flow from both to tokens, codebook and temperature, and only those asked for are
        computed. Under autocast tokens and codebook are cast as a matmul would cast them.
        Values inside tensors are checked on the CPU alone, outside of torch.compile: elsewhere a
        length outside [0, N] counts as the nearest, and a temperature of 0 or less gives what the
        formula gives. A NaN score stays in its sample, and what stands at a padded place is never
        looked at.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of tokens and codebook.
        ValueError: a wrong shape, device, name or Python number, an empty side, an unknown backend;
            on the CPU and outside of torch.compile a temperature or a length out of its range.
        RuntimeError: `backend` cannot run here; the message says why.
        NotImplementedError: differentiated twice through a compiled backend, or a transform of
            torch.func around one inside torch.compile.
    """
    check_tensor("fdt_pool", "tokens", tokens)
    check_tensor("fdt_pool", "codebook", codebook)
    tokens, codebook = cast_as_matmul(tokens, codebook)
    _check_inputs(tokens, codebook)
    temperature = _as_temperature(tokens, temperature)
    mask = _as_mask(tokens, mask, lengths)
    padded_score = _check_options(pool, normalize, padded_score)
    name = _dispatch.choose("fdt_pool", backend, BACKENDS, tokens, codebook)
    # the cast is done: autocast must not touch the float32 products of the definition
    with torch.autocast(tokens.device.type, enabled=False):
        if name == "eager":
            return reference(
                tokens,
                codebook,
                temperature,
                mask=mask,
                pool=pool,
                normalize=normalize,
                padded_score=padded_score,
            )
        if pool != "max":
            return _pool_first(tokens, codebook, temperature, mask, pool, normalize, padded_score)
    apply: Any = (_FDTPool if _dispatch.transformed("fdt_pool") else _EagerFDTPool).apply
    pooled, weights, _ = apply(tokens, codebook, temperature, mask, normalize, padded_score, name)
    return pooled, weights


def _check_inputs(tokens: Tensor, codebook: Tensor) -> None:
    if tokens.dim() != 3:
        raise ValueError(f"fdt_pool: tokens must be 3-D [B, N, D], got {list(tokens.shape)}")
    if 0 in tokens.shape:
        raise ValueError(f"fdt_pool: tokens must have no empty side, got {list(tokens.shape)}")
    check_matrix("fdt_pool", "tokens", tokens[0], "N, D")
    check_matrix("fdt_pool", "codebook", codebook, "C, D")
    if codebook.shape[1] != tokens.shape[2]:
        raise ValueError(
            f"fdt_pool: codebook must have D={tokens.shape[2]} columns like tokens, got "
            f"{codebook.shape[1]}"
        )
    check_alike("fdt_pool", "codebook", codebook, "tokens", tokens)


def _as_temperature(tokens: Tensor, temperature: float | Tensor) -> Tensor:
    made = as_scale("fdt_pool", tokens, temperature, "temperature")
    if made.device.type == "cpu" and not torch.compiler.is_compiling() and not made > 0:
        raise ValueError(f"fdt_pool: temperature must be above 0, got {made.item():g}")
    return made


def _as_mask(tokens: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    B, N, _ = tokens.shape
    if mask is not None and lengths is not None:
        raise ValueError("fdt_pool: mask and lengths are two ways to say one thing, got both")
    for name, x, shape, dtype in (
        ("mask", mask, (B, N), torch.bool),
        ("lengths", lengths, (B,), torch.int64),
    ):
        if x is None:
            continue
        check_tensor("fdt_pool", name, x)
        if x.dtype != dtype:
            raise TypeError(
                f"fdt_pool: {name} must be {type_name(dtype)}, got {type_name(x.dtype)}"
            )
        if x.shape != shape:
            letters = ", ".join(f"{k}={n}" for k, n in zip("BN", shape, strict=False))
            raise ValueError(f"fdt_pool: {name} must be [{letters}], got {list(x.shape)}")
        if x.device != tokens.device:
            raise ValueError(
                f"fdt_pool: {name} must be on {tokens.device} like tokens, got {x.device}"
            )
    if lengths is None:
        return mask
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > N:
            raise ValueError(f"fdt_pool: lengths must be from 0 to N={N}, got {low} to {high}")
    return torch.arange(N, device=tokens.device) < lengths.unsqueeze(1)


def _check_options(pool: str, normalize: str, padded_score: float) -> float:
    for name, value, known in (
        ("pool", pool, POOLS),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in known:
            names = ", ".join(f'"{word}"' for word in known)
            raise ValueError(f"fdt_pool: {name} must be one of {names}, got {value!r}")
    if padded_score == -math.inf:
        return padded_score
    return as_number("fdt_pool", "padded_score", padded_score)
