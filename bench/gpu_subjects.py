"""How `bench gpu` calls each op, and what it measures the errors of an op's kernels against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.ops import fdt_pool as dictionary
from mmfast.ops import pairwise_lse as pairwise
from mmfast.ops import pairwise_rank as ranking
from mmfast.ops import pairwise_softplus as sigmoid
from mmfast.ops import pairwise_stats as statistics
from mmfast.ops import sample_negatives as sampling
from mmfast.ops import slerp as spherical
from mmfast.ops import sparsemax as projection
from mmfast.ops._inputs import SCORE_TYPE
from mmfast.testing import landscape_magnitude, lse_magnitudes, pool_magnitudes, softplus_magnitudes

Inputs = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """How an op is called, and what its errors are measured against.

    run: (inputs, backend) -> its outputs. definition: the same from plain torch, of float64
    inputs the judge. reordered: the definition with its sums in another order, so that plain
    torch's own error is seen. magnitudes: what errors are relative to, by name of the result.
    wide: the results held in float32 or better, whatever the inputs are. differentiable: whether
    the leaves have gradients.
    """

    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    wide: tuple[str, ...]
    run: Callable[[Inputs, str], tuple[Tensor, ...]]
    definition: Callable[[Inputs], tuple[Tensor, ...]]
    reordered: Callable[[Inputs], tuple[Tensor, ...]]
    magnitudes: Callable[[Inputs, Results, list[Tensor], torch.dtype], dict[str, float]]
    differentiable: bool = True

    def eps(self, name: str, dtype: torch.dtype) -> float:
        """The rounding of one result for inputs of `dtype`."""
        return torch.finfo(SCORE_TYPE[dtype] if name in self.wide else dtype).eps


def results(
    subject: Subject, run: Callable[[], tuple[Tensor, ...]], inputs: Inputs, upstream: list[Tensor]
) -> Results:
    """Outputs by name, and as d<leaf> the gradients of their products with `upstream`."""
    outputs = run()
    if not subject.differentiable:
        return dict(zip(subject.outputs, outputs, strict=True))
    upstream = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)]
    # an empty row is -inf: times its upstream it would be NaN, so gradients are given directly
    grads = torch.autograd.grad(outputs, [inputs[name] for name in subject.leaves], upstream)
    names = (*subject.outputs, *(f"d{name}" for name in subject.leaves))
    return dict(zip(names, (*outputs, *grads), strict=True))


def _reordered_pool(inputs: Inputs) -> tuple[Tensor, ...]:
    flipped = {"tokens": inputs["tokens"].flip(2), "codebook": inputs["codebook"].flip(0, 1)}
    pooled, weights = dictionary.reference(**{**inputs, **flipped})
    return pooled.flip(1), weights.flip(1)


def _pool_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    return pool_magnitudes(inputs, exact["weights"], upstream)


def _reordered_lse(inputs: Inputs) -> tuple[Tensor, ...]:
    flipped = {**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}
    return pairwise.reference(**flipped, columns=True)


def _lse_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    return lse_magnitudes(**inputs, rows=exact["rows"], columns=exact["columns"], upstream=upstream)


def _reordered_softplus(inputs: Inputs) -> tuple[Tensor, ...]:
    return (sigmoid.reference(**{**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}),)


def _softplus_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    return softplus_magnitudes(inputs, upstream[0])


def _drawn(
    inputs: Inputs, draw: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Score + noise, in float64, of what `draw` takes for each row.

    Whatever comes within rounding of the best is right; another column far below it is not.
    """
    q, k, scale = (inputs[name].detach() for name in ("q", "k", "scale"))
    seed = torch.full((), 7, dtype=torch.int64, device=q.device)
    ids = [
        inputs.get(name, torch.arange(len(x), device=q.device))
        for name, x in (("q_ids", q), ("k_ids", k))
    ]
    index = draw(q, k, scale, seed, *ids)
    sums = sampling.noisy_scores(q.double(), k.double(), scale, seed, *ids)
    drawn = sums.gather(1, index.clamp(min=0)[:, None]).squeeze(1)
    return (drawn.masked_fill(index < 0, -torch.inf),)


def _draw_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The products that a score sums, and the noise beside it."""
    with torch.no_grad():
        products = inputs["scale"] * (inputs["q"].abs() @ inputs["k"].abs().T)
    return {"drawn": 2 * float(products.max()) + 20}


def _flipped(inputs: Inputs) -> Inputs:
    return {**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}


def _ranked(
    inputs: Inputs, rank: Callable[[Tensor, Tensor, Any, Any, Any], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The largest of each row, and in float64 what stands where it was found.

    Whatever comes within rounding of the best is right. How many exceed a threshold that no score
    is near is exact: all of a row, or none.
    """
    q, k = (inputs[name].detach() for name in ("q", "k"))
    ids = [inputs.get(name) for name in ("q_ids", "k_ids")]
    far = torch.full((len(q),), torch.inf, device=q.device)
    far[::2] = -1e4
    largest, index, above = rank(q, k, far.to(SCORE_TYPE[q.dtype]), *ids)
    at = (q.double() * k.double()[index.clamp(min=0)]).sum(1).masked_fill(index < 0, -torch.inf)
    return largest, at, above.double()


def _rank_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    with torch.no_grad():
        largest = 2 * float((inputs["q"].abs() @ inputs["k"].abs().T).max())
    return {"largest": largest, "at": 2 * largest, "above": 0.0}


EDGES = (-2.0, -0.4, 0.3, 2.0)


def _counted(
    inputs: Inputs, state: Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Means of powers and extremes of both sets, and of one; shares of the pairs by bin.

    A product within rounding of an edge may be in either bin: shares err by a pair or two.
    """
    x, y = (inputs[name].detach() for name in ("q", "k"))
    edges = torch.tensor(EDGES, dtype=torch.float64, device=x.device)
    pivot = torch.full((), 0.125, dtype=torch.float64, device=x.device)
    made: list[list[Tensor]] = [[], [], []]
    for other in (y, None):
        counts, powers, extremes, _ = state(x, other, edges, pivot)
        pairs = len(x) * len(y) if other is not None else max(1, len(x) * (len(x) - 1) // 2)
        for to, value in zip(made, (powers / pairs, extremes, counts / pairs), strict=True):
            to.append(value)
    powers, extremes, shares = (torch.cat(parts) for parts in made)
    return powers, extremes, shares


def _stats_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    with torch.no_grad():
        sides = inputs["q"], torch.cat([inputs["q"], inputs["k"]])
        size = 1 + float((sides[0].abs() @ sides[1].abs().T).max())
    pairs = min(len(sides[0]) * (len(sides[1]) - len(sides[0])), len(sides[0]) ** 2)
    eps = torch.finfo(SCORE_TYPE[dtype]).eps
    return {"powers": 8 * size**4, "extremes": 2 * size, "shares": 2 / (eps * pairs)}


def _reordered_slerp(inputs: Inputs) -> tuple[Tensor, ...]:
    a, b = inputs["a"].flip(1), inputs["b"].flip(1)
    return (spherical.reference(a, b, inputs["lam"]).flip(1),)


def _slerp_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The largest entry, and what a few roundings of the inner product do to the result.

    Near angles of 0 and pi they do much, in whatever way the weights are computed.
    """
    subject, inner = SUBJECTS["slerp"], torch.finfo(SCORE_TYPE[dtype]).eps
    moved = dict.fromkeys(exact, 0.0)
    for step in (-4 * inner, 4 * inner):
        nearby = {**inputs, "a": (inputs["a"].detach() * (1 + step)).requires_grad_()}
        run = partial(subject.definition, nearby)
        for name, x in results(subject, run, nearby, upstream).items():
            moved[name] = max(moved[name], _largest(x - exact[name]))
    return {name: _largest(x) + moved[name] / subject.eps(name, dtype) for name, x in exact.items()}


def _landscape(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Losses in units of a cosine, whose rounding a cold temperature makes larger; distances."""
    z = mmfast.shift_landscape(**inputs, backend=backend)
    unit = z.temperatures.to(z.distance.dtype)
    return z.image_to_text * unit, z.text_to_image * unit, z.distance


def _largest(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _sparsemax_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The largest weight, and for a gradient the upstream that its mean is taken from."""
    return {"p": _largest(exact["p"]), "dx": _largest(upstream[0])}


# how each op of BACKENDS is checked; one that is missing here is reported red
SUBJECTS = {
    "fdt_pool": Subject(
        leaves=("tokens", "codebook", "temperature"),
        outputs=("pooled", "weights"),
        wide=("weights", "dtemperature"),
        run=lambda inputs, backend: mmfast.fdt_pool(**inputs, backend=backend),
        definition=lambda inputs: dictionary.reference(**inputs),
        reordered=_reordered_pool,
        magnitudes=_pool_magnitudes,
    ),
    "pairwise_lse": Subject(
        leaves=("q", "k", "scale"),
        outputs=("rows", "columns"),
        wide=("rows", "columns"),
        run=lambda inputs, backend: mmfast.pairwise_lse(**inputs, columns=True, backend=backend),
        definition=lambda inputs: pairwise.reference(**inputs, columns=True),
        reordered=_reordered_lse,
        magnitudes=_lse_magnitudes,
    ),
    "pairwise_rank": Subject(
        leaves=("q", "k"),
        outputs=("largest", "at", "above"),
        wide=("largest", "at", "above"),
        run=lambda inputs, backend: _ranked(
            inputs, lambda *args: torch.ops.mmfast.pairwise_rank(*args, backend)
        ),
        definition=lambda inputs: _ranked(inputs, ranking.reference),
        reordered=lambda inputs: _ranked(_flipped(inputs), ranking.reference),
        magnitudes=_rank_magnitudes,
        differentiable=False,
    ),
    "pairwise_softplus": Subject(
        leaves=("q", "k", "scale", "bias"),
        outputs=("sum",),
        wide=("sum", "dbias"),
        run=lambda inputs, backend: (mmfast.pairwise_softplus(**inputs, backend=backend),),
        definition=lambda inputs: (sigmoid.reference(**inputs),),
        reordered=_reordered_softplus,
        magnitudes=_softplus_magnitudes,
    ),
    "pairwise_stats": Subject(
        leaves=("q", "k"),
        outputs=("powers", "extremes", "shares"),
        wide=("powers", "extremes", "shares"),
        run=lambda inputs, backend: _counted(
            inputs, lambda *args: torch.ops.mmfast.pairwise_stats(*args, backend)
        ),
        definition=lambda inputs: _counted(inputs, statistics.reference),
        reordered=lambda inputs: _counted(_flipped(inputs), statistics.reference),
        magnitudes=_stats_magnitudes,
        differentiable=False,
    ),
    "sample_negatives": Subject(
        leaves=("q", "k", "scale"),
        outputs=("drawn",),
        wide=("drawn",),
        run=lambda inputs, backend: _drawn(
            inputs, lambda *args: torch.ops.mmfast.sample_negatives(*args, backend)
        ),
        definition=lambda inputs: _drawn(inputs, sampling.reference),
        reordered=lambda inputs: _drawn(
            {**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}, sampling.reference
        ),
        magnitudes=_draw_magnitudes,
        differentiable=False,
    ),
    "shift_landscape": Subject(
        leaves=("x", "y"),
        outputs=("image_to_text", "text_to_image", "distance"),
        wide=("image_to_text", "text_to_image", "distance"),
        run=_landscape,
        definition=lambda inputs: _landscape(inputs, "eager"),
        reordered=lambda inputs: _landscape(
            {**inputs, "x": inputs["x"].flip(1), "y": inputs["y"].flip(1)}, "eager"
        ),
        magnitudes=lambda made, exact, *_: dict.fromkeys(exact, landscape_magnitude(**made)),
        differentiable=False,
    ),
    "slerp": Subject(
        leaves=("a", "b", "lam"),
        outputs=("m",),
        wide=("dlam",),
        run=lambda inputs, backend: (mmfast.slerp(**inputs, backend=backend),),
        definition=lambda inputs: (spherical.reference(**inputs),),
        reordered=_reordered_slerp,
        magnitudes=_slerp_magnitudes,
    ),
    "sparsemax": Subject(
        leaves=("x",),
        outputs=("p",),
        wide=(),
        run=lambda inputs, backend: (mmfast.sparsemax(**inputs, backend=backend),),
        definition=lambda inputs: (projection.reference(**inputs),),
        reordered=lambda inputs: (projection.reference(inputs["x"].flip(1)).flip(1),),
        magnitudes=_sparsemax_magnitudes,
    ),
}
