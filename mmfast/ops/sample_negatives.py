"""One negative for every row, drawn by how hard it is, without the matrix of similarities.

    s_ij = scale * <q_i, k_j>
    P(row i draws j) = exp(s_ij) / sum_l exp(s_il)     over the pairs whose ids differ

in one visit of the scores, as the Gumbel-max: with words x_ij of 32 random bits,

    v_ij = (x_ij + 1/2) / 2^32       noise_ij = -log(-log(1 - v_ij))
    index[i] = argmax_j s_ij + noise_ij

A draw is decided by the largest noises, which come of the smallest v: their 1 - v would round to a
few values near one, so it is never formed, and log1p(-v) is taken. The words are those of
Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) for the counter
(j // 4, i, 0, 0), word j % 4, and one 64-bit seed a call as key. They depend on nothing else: every
backend and any number of threads draw the same, except where two sums agree within rounding. 32
bits resolve probabilities down to about 1e-9.

Source: the hard negatives of image-text matching in Li et al., Align before Fuse, NeurIPS 2021
(arXiv 2107.07651). The published code (github.com/salesforce/ALBEF) leaves pairs out after the
softmax, so that a row whose own pair took all of the weight has only zeros and `torch.multinomial`
raises; here they are left out before it, which is the same distribution and always has one. It also
waits for the device once a row; here nothing waits.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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

_WORD = 0xFFFFFFFF


def reference(
    q: Tensor, k: Tensor, scale: float | Tensor, seed: Tensor, q_ids: Tensor, k_ids: Tensor
) -> Tensor:
    """The definition in plain torch: any device, [N, M] memory. seed: 0-dim int64."""
    s = noisy_scores(q, k, scale, seed, q_ids, k_ids)
    return torch.where(s.amax(1) == -math.inf, -1, s.argmax(1))


def noisy_scores(
    q: Tensor, k: Tensor, scale: float | Tensor, seed: Tensor, q_ids: Tensor, k_ids: Tensor
) -> Tensor:
    """s_ij + noise_ij in float64, -inf where nothing is to be drawn: [N, M]."""
    dtype = SCORE_TYPE[q.dtype]
    s = scale * (q.to(dtype) @ k.to(dtype).T)
    v = (words(seed, *s.shape, device=q.device) + 0.5) / 2**32
    s = s - torch.log(-torch.log1p(-v))
    return s.masked_fill((q_ids[:, None] == k_ids) | s.isnan(), -math.inf)


def words(seed: Tensor, N: int, M: int, *, device: torch.device) -> Tensor:
    """32 random bits for every pair: float64 [N, M] of whole numbers."""
    column = torch.arange(-(-M // 4), device=device)
    zero = torch.zeros_like(column)
    row = torch.arange(N, device=device)[:, None]
    made = torch.stack(philox((column, row, zero, zero), seed), dim=2)
    return made.reshape(N, -1)[:, :M].double()


def philox(counter: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """The four words of a counter of four, all int64 that hold 32 bits."""
    a, b, c, d = counter
    low, high = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # products of 64 bits, of which int64 keeps every one
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (q >> 32 & _WORD) ^ b ^ low, q & _WORD
        c, d = (p >> 32 & _WORD) ^ d ^ high, p & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return a, b, c, d


def _cpp(q: Tensor, k: Tensor, scale: Tensor, seed: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
    indices = torch.empty(q.shape[0], dtype=torch.int64)
    _dispatch.core.sample_negatives(
        dense(q),
        dense(k),
        scale.item(),
        int(seed.item()),
        q_ids.contiguous(),
        k_ids.contiguous(),
        indices,
        torch.get_num_threads(),
    )
    return indices


def _triton(*inputs: Any) -> Any:
    return _dispatch.kernels("sample_negatives").sample(*inputs)


def _fake(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape[0], dtype=torch.int64)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

_sample = _dispatch.define(
    "sample_negatives(Tensor q, Tensor k, Tensor scale, Tensor seed, Tensor q_ids, Tensor k_ids, "
    "str backend) -> Tensor",
    _fake,
    {"cpp": _cpp, "triton": _triton},
)


def sample_negatives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    allow_empty: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A column of k for every row of q, drawn from softmax(scale * q @ k.T) without its own pair.

    In O((N + M) * D) memory, and in the time of one product where D is a few hundred.

    Args:
        q: [N, D] float32, float64, bfloat16 or float16; any row stride, rows need not be unit.
        k: [M, D] of the same type and device.
        scale: a number, or a floating tensor of one element; never read back from a GPU.
        q_ids, k_ids: int64 [N] and [M], both or neither; a pair with equal ids is never drawn.
            Default: row numbers, so that row i does not draw column i.
        generator: where the seed of the call comes from, one int64 drawn on its device, and the
            only thing taken from it. Default: torch's own of the device of q.
        allow_empty: let a row without a candidate be.
        backend: "cpp", "triton", "eager", or None for the first that can run.

    Returns:
        index [N] int64; it has no gradient. A row without a candidate has -1: every pair left out,
        or scores of -inf and NaN alone. A NaN score is never drawn, a score of +inf always, the
        lowest column of several. Scores within rounding of each other are told apart by their
        noise; where the sums are equal, too, the lowest column is drawn.
        Under autocast q and k are cast as a matmul would cast them.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of q and k.
        ValueError: a wrong shape, device or Python number, an empty side, an unknown backend; a
            row without a candidate, on the CPU and outside torch.compile, unless `allow_empty`.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    check_tensor("sample_negatives", "q", q)
    check_tensor("sample_negatives", "k", k)
    q, k = cast_as_matmul(q.detach(), k.detach())
    check_pair("sample_negatives", q, k)
    check_ids("sample_negatives", q, k, q_ids, k_ids)
    scale = as_scale("sample_negatives", q, scale).detach()
    name = _dispatch.choose("sample_negatives", backend, BACKENDS, q, k)
    seed = _seed(q, generator)
    if q_ids is None or k_ids is None:
        q_ids, k_ids = (torch.arange(len(x), device=x.device) for x in (q, k))
    if name == "eager":
        # the cast is done: autocast must not touch the float32 product of the definition
        with torch.autocast(q.device.type, enabled=False):
            index = reference(q, k, scale, seed, q_ids, k_ids)
    else:
        index = _sample(q, k, scale, seed, q_ids, k_ids, name)
    if not allow_empty and index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_drawn(index)
    return index


def _seed(q: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.randint(2**63 - 1, (), device=q.device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "sample_negatives: generator must be a torch.Generator or None, got "
            f"{type(generator).__name__}"
        )
    if generator.device != q.device and generator.device.type != "cpu":
        raise ValueError(
            f"sample_negatives: generator must be on {q.device} like q or on the CPU, got "
            f"{generator.device}"
        )
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device)


def _check_drawn(index: Tensor) -> None:
    if index.min() < 0:
        raise ValueError(
            f"sample_negatives: row {int(index.argmin())} has no candidate: its ids leave every "
            "pair out, or its scores are NaN or -inf; pass allow_empty=True to get -1 there"
        )
